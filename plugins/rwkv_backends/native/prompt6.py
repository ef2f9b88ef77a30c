"""The prompts of RWKV-6: torch multiplies, and what is between the products of attention is C."""

from __future__ import annotations

import ctypes

import torch
from rwkv_layers import rwkv6
from rwkv_layers.linear import linear
from rwkv_layers.rwkv6 import TimeMixing
from torch import Tensor

from rwkv_backends.native.structs import DTYPES
from rwkv_backends.native.team import Team

HEAD = 64
"""The size of a head that the C is for; all published models have it."""


class Attention(ctypes.Structure):
    """`struct attention` of prompt6.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("team", "kvrg", "decay", "bonus", "weight", "bias", "state", "out")),
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "dtype")),
    ]


class TimeMixing6:
    """`time_mixing` of rwkv_layers/rwkv6.py. Steps, and heads of other sizes, are left to that."""

    def __init__(self, library: ctypes.CDLL, team: Team) -> None:
        self.team, self.attend = team, library["rwkv6_attention"]
        size = library["rwkv6_attention_size"]
        size.restype = ctypes.c_int64
        assert size() == ctypes.sizeof(Attention), "C and Python disagree on a structure"

    def __call__(self, x: Tensor, x_prev: Tensor, kv: Tensor, w: TimeMixing) -> Tensor:
        if x.shape[1] == 1 or w.bonus.shape[1] != HEAD or not kv.is_contiguous():
            return rwkv6.time_mixing(x, x_prev, kv, w)
        kvrg, raw = rwkv6.projected(x, x_prev, w)
        return linear(self.attended(kvrg, raw, kv, w).to(x.dtype), w.output)

    def attended(self, kvrg: Tensor, raw: Tensor, kv: Tensor, w: TimeMixing) -> Tensor:
        """`attended` of rwkv_layers/rwkv6.py, of the type of kvrg."""
        B, T, H, N = raw.shape
        kvrg, raw = kvrg.contiguous(), raw.contiguous()
        out = torch.empty((B, T, H * N), dtype=kvrg.dtype)
        vectors = (w.bonus, w.ln_x_weight, w.ln_x_bias)
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (raw, kv, *vectors))
        given = [ctypes.addressof(self.team), *(t.data_ptr() for t in (kvrg, raw, *vectors, kv, out))]
        attention = Attention(*given, B, T, H, DTYPES[kvrg.dtype])
        self.attend(ctypes.byref(attention), ctypes.c_int64(torch.get_num_threads()))
        return out

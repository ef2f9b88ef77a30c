"""RWKV-7's low-rank adapters side by side, so that one product makes the first halves of all, and one the second.

Annotations are real types, not strings: Triton reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from rwkv_layers.rwkv7 import TimeMixing
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, sigmoid, store, tanh, wait_for_earlier
from rwkv_backends.kernels.sizes import cdiv
from rwkv_backends.kernels.tuning import Tuning

SIZE = 4096
"""Numbers that one program goes through."""


class Adapters(NamedTuple):
    """Of value (not in the first layer), rate, decay and gate. What a rank lacks of R is zero."""

    down: Tensor  # [n, R, C]
    up: Tensor  # [n, C, R]
    ranks: tuple[int, int, int, int]  # of value, which may be 0, rate, decay, gate


@triton.jit
def activate_kernel(low_ptr, size, half, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    low = load_vector(low_ptr, at, at < size)
    store(low_ptr + at, tl.where(at < half, tanh(low), sigmoid(low)), at < size)


def pack(att: TimeMixing, step: int) -> Adapters:
    """Ranks are filled up to a multiple of `step`."""
    mix = att.value_mix
    downs = [*([mix.down] if mix else []), att.rate.down, att.decay.down, att.gate_down]
    ups = [*([mix.up] if mix else []), att.rate.up, att.decay.up, att.gate_up]
    R = max(map(len, downs))
    R += -R % step
    down = torch.stack([F.pad(t, [0, 0, 0, R - len(t)]) for t in downs])
    up = torch.stack([F.pad(t, [0, R - t.shape[1]]) for t in ups])
    value, rate, decay, gate = [*([] if mix else [0]), *map(len, downs)]
    return Adapters(down, up, (value, rate, decay, gate))


def activate(low: Tensor, tuning: Tuning) -> None:
    """low [n, M, R] in place: tanh of the last but one, the decay's; the gate's, the last, through a sigmoid."""
    size = low[-2:].numel()
    activate_kernel[cdiv(size, SIZE),](low[-2:], size, size // 2, SIZE, num_warps=4, **tuning.launch)

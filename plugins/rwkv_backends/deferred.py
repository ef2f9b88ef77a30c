"""States of a batch that a step reads rounded and seldom writes: of many rows they are most of what a step moves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_runtime import Model, State

FILLED, SLOT = "deferred_filled", "deferred_slot"
KEYS, VALUES, DECAYS = WAITING = "deferred_k", "deferred_v", "deferred_w"
ROUNDED = "deferred_rounded"


class Deferred(NamedTuple):
    """What one layer's states [B, H, K, V] have yet to take in: S = diag(exp(w)) S + k^T v, for one slot after another.

    filled int32 [B], how many slots hold an update, oldest first: 0 in a row that has just come, all of whose slots are
    zero; slot int32 [B], the one for the token at hand; k [B, ROOM, H K] and v [B, ROOM, H V], of the model's dtype; w
    float32 [B, ROOM, H K], logarithms of decays; rounded [B, H, K, V], what a step reads: a float32 state in bfloat16
    where that is the model's dtype, any other as it is kept.
    """

    filled: Tensor
    slot: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    rounded: Tensor


class DeferredState(State):
    """RWKV-6's state, the updates of the last few tokens, which have not been made to it, and what it is rounded to.

    A step first makes the updates of rows that have no room for another, then reads what that left, rounded as the
    model's other numbers are, with the updates since. When a row's are made depends only on how long it has been there.

    A model in float16, which has not the range of a state in float32, reads it as it is kept.
    """

    own = frozenset((FILLED, SLOT, *WAITING, ROUNDED))

    @classmethod
    def of(cls, model: Model, rows: int, room: int) -> DeferredState:
        """Fresh rows, with room for so many updates of each."""
        plain, dtype, device = model.new_state(rows), model.dtype, model.device
        kv = plain["att_kv"]
        shape = len(kv), rows, room, model.config.n_embd
        own = {
            FILLED: torch.zeros(shape[:2], dtype=torch.int32, device=device),
            SLOT: torch.zeros(shape[:2], dtype=torch.int32, device=device),
            KEYS: torch.zeros(shape, dtype=dtype, device=device),
            VALUES: torch.zeros(shape, dtype=dtype, device=device),
            DECAYS: torch.zeros(shape, device=device),
        }
        if kv.dtype == torch.float32 and dtype == torch.bfloat16:
            own[ROUNDED] = torch.zeros_like(kv, dtype=dtype)
        return cls({**plain.tensors, **own}, plain.initial, plain.architecture)

    @property
    def rounded(self) -> Tensor | None:
        """[L, B, H, K, V], where it is not the state itself."""
        return self.tensors.get(ROUNDED)

    def layer(self, i: int) -> Deferred:
        read = self["att_kv"] if self.rounded is None else self.rounded
        return Deferred(*(t[i] for t in (*(self[name] for name in (FILLED, SLOT, *WAITING)), read)))

    def settle(self) -> None:
        """Makes all updates; the rows are as if they had just come."""
        for i, kv in enumerate(self["att_kv"]):
            self.keep("att_kv", i, _updated(kv, self.layer(i)))
        for name in (FILLED, *WAITING):
            self[name].zero_()

    def settled(self, row: int) -> State:
        one = self.view(row, row + 1).clone()
        one.settle()
        return one.plain


def _updated(kv: Tensor, deferred: Deferred) -> Tensor:
    """kv [B, H, K, V], as kept -> float32, with all updates."""
    B, H, K, V = kv.shape
    filled, _, k, v, w, _ = deferred
    kv = kv.float()
    for j in range(k.shape[1]):
        there = (filled > j)[:, None]
        decay = torch.where(there, w[:, j], 0.0).exp().view(B, H, K, 1)
        key, value = (torch.where(there, t[:, j], 0.0).float() for t in (k, v))
        kv = kv * decay + key.view(B, H, K, 1) * value.view(B, H, 1, V)
    return kv

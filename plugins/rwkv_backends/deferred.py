"""States of a batch that a step reads and seldom writes: of many rows they are most of what a step moves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_runtime import Model, State

WAITING, KEYS, VALUES, LEFT = "deferred_waiting", "deferred_k", "deferred_v", "deferred_w"
OWN = (WAITING, KEYS, VALUES, LEFT)


class Deferred(NamedTuple):
    """What one layer's states [B, H, K, V] have yet to take in: S = diag(w) S' + the sum of k_j^T v_j, S' as written.

    waiting int32 [B], the number of each row's updates, the oldest of which is the first; k float32 [B, ROOM, H K],
    decayed to the last token; v [B, ROOM, H V], of the model's dtype; w float32 [B, H K], of no meaning without any.
    """

    waiting: Tensor
    k: Tensor
    v: Tensor
    w: Tensor


class DeferredState(State):
    """RWKV-6's state, and the updates of the last few tokens that have not been made to it.

    A step adds its update to those, and makes them all where there is no room: it writes a state every ROOM + 1 steps.
    Rows may differ in how many they have.
    """

    own = frozenset(OWN)

    @classmethod
    def of(cls, model: Model, rows: int, room: int) -> DeferredState:
        """Fresh rows, with room for so many updates of each."""
        plain, C, device = model.new_state(rows), model.config.n_embd, model.device
        L = len(plain["att_kv"])
        own = {
            WAITING: torch.zeros(L, rows, dtype=torch.int32, device=device),
            KEYS: torch.zeros(L, rows, room, C, device=device),
            VALUES: torch.zeros(L, rows, room, C, dtype=model.dtype, device=device),
            LEFT: torch.zeros(L, rows, C, device=device),
        }
        return cls({**plain.tensors, **own}, plain.initial, plain.architecture)

    @property
    def room(self) -> int:
        return self[KEYS].shape[2]

    def layer(self, i: int) -> Deferred:
        return Deferred(*(self[name][i] for name in OWN))

    def advance(self) -> None:
        """After a step of all rows: each has one more update, or none where there was no room."""
        self[WAITING].add_(1).remainder_(self.room + 1)

    def settle(self) -> None:
        """Makes all updates."""
        for i, kv in enumerate(self["att_kv"]):
            self.keep("att_kv", i, _updated(kv, self.layer(i)))
        self[WAITING].zero_()

    def settled(self, row: int) -> State:
        one = self.view(row, row + 1).clone()
        one.settle()
        return one.plain


def _updated(kv: Tensor, deferred: Deferred) -> Tensor:
    """kv [B, H, K, V], as written -> float32, with all updates."""
    B, H, K, V = kv.shape
    waiting, k, v, w = deferred
    room = k.shape[1]
    there = torch.arange(room, device=kv.device) < waiting[:, None]  # [B, ROOM]
    k = torch.where(there[:, :, None], k, 0.0).view(B, room, H, K).permute(0, 2, 3, 1)  # [B, H, K, ROOM]
    v = torch.where(there[:, :, None], v.float(), 0.0).view(B, room, H, V).transpose(1, 2)  # [B, H, ROOM, V]
    w = torch.where(waiting[:, None] > 0, w, 1.0).view(B, H, K, 1)
    return kv.float() * w + k @ v

"""The logits of a decode step into the engine's buffer as one kernel. Its naive twin is `Backend.step`."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.prompts import Padded
from rwkv_runtime import State

ROWS, COLS = 4, 2048


@dataclass(frozen=True)
class Widened:
    """A forward pass made of one whose logits may be of the model's dtype, as its head gives them."""

    narrow: Padded

    def __call__(self, tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        return self.narrow(tokens, state, every, length).float()


@triton.jit(do_not_specialize=["B"])
def widen_kernel(narrow_ptr, absent_ptr, logits_ptr, B, V, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = (rows < B) & (cols < V)[None, :]
    z = tl.load(narrow_ptr + rows * V + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if absent_ptr is not None:
        z += tl.load(absent_ptr + cols, mask=cols < V, other=0.0)[None, :]
    tl.store(logits_ptr + rows * V + cols[None, :], z, mask=mask)


def widen(narrow: Tensor, absent: Tensor | None, logits: Tensor) -> None:
    """narrow [B, V], float32 absent [V] -> logits float32 [B, V], of which both are contiguous: their sum."""
    B, V = logits.shape
    rows = min(ROWS, next_power_of_2(B))
    grid = cdiv(V, COLS), cdiv(B, rows)
    widen_kernel[grid](narrow, absent, logits, B, V, rows, COLS, num_warps=2 * rows)

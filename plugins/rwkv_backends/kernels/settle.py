"""The end of a draw as one kernel. Its naive twin is `Backend.settle`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rwkv_runtime import Outcome

BLOCK = 4096
"""Logits that a program looks at together, where it has to look at all."""


@triton.jit(do_not_specialize=["V"])
def settle_kernel(token_ptr, logits_ptr, drawn_ptr, tokens_ptr, position_ptr, before_ptr, token_stride, stride, V,
                  REFUSED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    token = tl.load(token_ptr + row * token_stride)
    position = tl.load(position_ptr + row)
    chosen = tl.load(logits_ptr + tl.minimum(tl.maximum(token, 0), V - 1))
    valid = (token >= 0) & (token < V) & (chosen > -float("inf")) & (chosen < float("inf"))
    if not REFUSED:
        highest = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + ids, mask=ids < V, other=-float("inf"))
            highest = tl.maximum(highest, tl.where(z != z, float("inf"), z))
        valid = valid & (tl.max(highest, axis=0) < float("inf"))
    token = tl.where(valid, token, -1)
    tl.store(drawn_ptr + row, token)
    tl.store(tokens_ptr + row, tl.maximum(token, 0))
    tl.store(before_ptr + row, position)
    tl.store(position_ptr + row, position + 1)


def settle(token: Tensor, logits: Tensor, refused: bool, outcome: Outcome) -> Tensor:
    """As `Backend.settle`; token int64 [B], logits [B, V], all on one device."""
    B, V = logits.shape
    settle_kernel[B,](
        token, logits, outcome.drawn, outcome.tokens, outcome.position, outcome.before,
        token.stride(0), logits.stride(0), V, refused, BLOCK, num_warps=1 if refused else 16,
    )  # fmt: skip
    return outcome.drawn

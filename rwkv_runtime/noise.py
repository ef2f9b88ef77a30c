"""Counter-based random numbers: (seed, position, token id) -> uniform.

There is no generator state. A draw depends on its key alone, so it is the same in any row of any
batch, needs no host synchronisation and can be captured in a graph, as long as seed and position
live in device tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of x."""
    return (x & 0x7FFFFFFF) - (x & 0x80000000)


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 that scatters neighbours; done in place, for fresh memory costs as much as arithmetic.

    The multiply-xorshift hash "lowbias32" from C. Wellons' search for low-bias integer hashes
    (https://nullprogram.com/blog/2018/07/31/). int32 arithmetic wraps; its shifts drag the sign along, which the
    masks take off.
    """
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def uniform(seed: Tensor, position: Tensor, ids: Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one for each key.

    seed and position are int64 [B, 1] (all 64 bits count), ids int64 [1, V] or [B, V]; the result is
    float32, broadcast to [B, V]. Samplers that need numbers beside the final draw take another `stream`.
    """
    rows = max(len(seed), len(position))
    words = torch.cat([seed.expand(rows, 1), position.expand(rows, 1)], dim=1)  # [B, 2]
    words = mix(mix(words.to(torch.int32)) ^ (words >> 32).to(torch.int32))  # the low halves, then the high ones
    s, p = words[:, :1], words[:, 1:]
    # Two keys, which differ as a pair wherever s or p does. Two rounds with different ones, since one alone would
    # make nearby keys' numbers permutations of each other.
    keys = mix(torch.cat([s + p * _signed(0x9E3779B9), s + p * _signed(0x85EBCA6A)], dim=1) ^ stream)
    h = mix(ids.to(torch.int32) ^ keys[:, :1])  # [B, V]
    h = mix(h.bitwise_xor_(keys[:, 1:]))
    # Small numbers, which become the largest Gumbel noise, are the exact ones in float32.
    return h.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)


def minus_gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise with its sign turned, float32, finite: argmax(logits - it) draws from softmax(logits)."""
    return uniform(seed, position, ids).neg_().log1p_().neg_().log_()

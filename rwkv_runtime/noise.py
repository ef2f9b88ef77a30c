"""Counter-based random numbers: (seed, position, token id) -> uniform.

There is no generator state. A draw depends on its key alone, so it is the same in any row of any
batch, needs no host synchronisation and can be captured in a graph, as long as seed and position
live in device tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(x: Tensor, factor: int) -> Tensor:
    # The factor as a signed 32-bit number: a 32-bit x then never overflows int64, and the low half is the same.
    return (x * (factor - (1 << 32) if factor >> 31 else factor)) & _MASK


def mix(x: Tensor) -> Tensor:
    """A bijection of the 32-bit numbers in an int64 tensor that scatters neighbours.

    The multiply-xorshift hash "lowbias32" from C. Wellons' search for low-bias integer hashes
    (https://nullprogram.com/blog/2018/07/31/).
    """
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = _multiply(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def uniform(seed: Tensor, position: Tensor, ids: Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one for each key.

    seed and position are int64 [B, 1] (all 64 bits count), ids int64 [1, V] or [B, V]; the result is
    float32, broadcast to [B, V]. Samplers that need numbers beside the final draw take another `stream`.
    """
    key = mix((seed & _MASK) ^ stream)
    key = mix(key ^ ((seed >> 32) & _MASK))
    row = mix(key ^ (position & _MASK))  # [B, 1]
    row = mix(row ^ ((position >> 32) & _MASK) ^ 0x9E3779B9)
    # Two rounds with different keys: one alone would make nearby keys' numbers permutations of each other.
    h = mix(mix((ids ^ row) & _MASK) ^ mix(row ^ key ^ 0x85EBCA6B))  # [B, V]
    return ((h.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, finite everywhere: argmax(logits + gumbel) draws from softmax(logits)."""
    return -torch.log(-torch.log1p(-uniform(seed, position, ids)))

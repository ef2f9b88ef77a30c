"""Nucleus sampling on a GPU without sorting: three kernels. Their naive twin is `Nucleus.filter` and a draw.

The Gumbel-max trick gives every token a noisy score; what is drawn is the highest noisy score among the tokens that
are kept. So the candidates are tried in that order: one sweep over the row tells whether a candidate is kept, and finds
the next one among the tokens likelier than it. A candidate that is not kept rules out all that are no likelier, which
leaves a share of the mass that is uniform in (0, 1): two or three sweeps are usual, some ten for a hostile row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_runtime import Controls

BLOCK = 4096
WARPS = 16


def sample(logits: Tensor, controls: Controls, unit: float) -> Tensor:
    """float32 logits [B, V] -> int64 [B], -1 for a row that cannot be drawn from.

    `unit` is the mass of the likeliest token, in which the masses of the others are rounded to whole numbers.
    """
    B, V = logits.shape
    blocks = triton.cdiv(V, BLOCK)
    best = torch.empty((B, blocks), dtype=torch.float32, device=logits.device)
    noisy = torch.empty((B, V), dtype=torch.float32, device=logits.device)
    drawn = torch.empty(B, dtype=torch.int64, device=logits.device)
    temperature, top_p, top_k = controls["temperature"], controls["top_p"], controls["top_k"]
    wide = triton.next_power_of_2(blocks)
    _best[(B, blocks)](logits, best, logits.stride(0), V, blocks, BLOCK, num_warps=4)
    _perturb[(B, blocks)](
        logits, best, noisy, temperature, top_p, controls.seed, controls.position,
        logits.stride(0), V, blocks, wide, BLOCK, num_warps=8,
    )  # fmt: skip
    _draw[(B,)](
        logits, best, noisy, drawn, temperature, top_p, top_k, controls.seed, controls.position,
        logits.stride(0), unit, V, blocks, wide, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return drawn


@triton.jit
def _best(logits, best, stride, V, blocks, BLOCK: tl.constexpr):
    """The highest logit of each block; inf where one is NaN, so that the row is refused."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    z = tl.where(z != z, float("inf"), z)
    tl.store(best + row * blocks + block, tl.max(z, axis=0))


@triton.jit
def _perturb(
    logits, best, noisy, temperature, top_p, seed, position, stride, V, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """The noisy scores (z - z_max) / T + g; where the row is greedy, without noise."""
    row, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    top = _row_best(best, row, blocks, WIDE)
    divisor = tl.load(temperature + row)
    greedy = (divisor == 0.0) | (tl.load(top_p + row) == 0.0)
    first, second = _keys(tl.load(seed + row), tl.load(position + row))
    noise = tl.where(greedy, 0.0, _gumbel(ids, first, second))
    score = (z - top) / tl.where(greedy, 1.0, divisor) + noise
    tl.store(noisy + row * V + ids, score, mask=ids < V)


@triton.jit
def _draw(
    logits, best, noisy, drawn, temperature, top_p, top_k, seed, position,
    stride, unit, V, blocks, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    noisy += row * V
    top = _row_best(best, row, blocks, WIDE)
    divisor, share = tl.load(temperature + row), tl.load(top_p + row)
    greedy = (divisor == 0.0) | (share == 0.0)
    divisor = tl.where(greedy, 1.0, divisor)
    k = tl.load(top_k + row)
    count = tl.where(greedy, 1, tl.where(k > 0, k, V + 1))

    # All the mass, and the first candidate.
    total, _, _, _, candidate = _sweep(logits, noisy, top, top, unit, V, True, BLOCK)
    wanted = tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * share.to(tl.float64)).to(tl.int64), 1), total)
    target = tl.where(share < 1.0, wanted, total + 1)

    token = tl.where((top == float("inf")) | (top == -float("inf")), -1, candidate)
    trying = token >= 0
    while trying:
        z = tl.load(logits + token)
        above, n_above, tied, n_tied, likelier = _sweep(logits, noisy, z, top, unit, V, False, BLOCK)
        before_cut = (above + tied < target) & (n_above + n_tied < count)
        after_cut = (n_above > 0) & ((above >= target) | (n_above >= count))
        if after_cut:
            token = likelier
        else:
            trying = False
            if not before_cut:
                # At the cut: the tied tokens share what is left, and compete with the likelier ones as the lesser.
                left = tl.minimum(count - n_above, n_tied)
                each = (target - above).to(tl.float64) / (left.to(tl.float64) * unit)
                cut_down = (above + tied >= target) & (n_above > 0)
                weight = tl.where(cut_down, tl.minimum(tl.log(each).to(tl.float32), z - top), z - top)
                tie = _noisiest_tie(logits, noisy, z, left, V, BLOCK)
                first, second = _keys(tl.load(seed + row), tl.load(position + row))
                noise = tl.where(greedy, 0.0, _gumbel(tie, first, second))
                rival = tl.load(noisy + tl.maximum(likelier, 0))
                token = tl.where((likelier >= 0) & (rival > weight / divisor + noise), likelier, tie)
    tl.store(drawn + row, token.to(tl.int64))


@triton.jit
def _sweep(logits, noisy, floor, top, unit, V, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens with z > floor: mass, number, and the noisiest one (-1: there is none); and of those with z == floor
    mass and number. With ALL every token counts as above the floor.
    """
    above = tl.zeros((BLOCK,), tl.int64)
    tied = tl.zeros((BLOCK,), tl.int64)
    n_above = tl.zeros((BLOCK,), tl.int32)
    n_tied = tl.zeros((BLOCK,), tl.int32)
    score = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32) + V
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        s = tl.load(noisy + ids, mask=ids < V, other=-float("inf"))
        weight = _whole(tl.exp(z - top) * unit)
        inside = (ids < V) & ((z > floor) | ALL)
        equal = (ids < V) & (z == floor)
        above += tl.where(inside, weight, 0)
        n_above += inside.to(tl.int32)
        tied += tl.where(equal, weight, 0)
        n_tied += equal.to(tl.int32)
        better = inside & (s > score)
        score = tl.where(better, s, score)
        where = tl.where(better, ids, where)
    lowest = tl.min(tl.where(score == tl.max(score, axis=0), where, V), axis=0)
    noisiest = tl.where(lowest < V, lowest, -1)
    return tl.sum(above, axis=0), tl.sum(n_above, axis=0), tl.sum(tied, axis=0), tl.sum(n_tied, axis=0), noisiest


@triton.jit
def _noisiest_tie(logits, noisy, tie, left, V, BLOCK: tl.constexpr):
    """Of the first `left` tokens with z == `tie`, by their ids, the one with the most noise."""
    seen = 0
    score = -float("inf")
    token = -1
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        s = tl.load(noisy + ids, mask=ids < V, other=-float("inf"))
        equal = (ids < V) & (z == tie)
        place = seen + tl.cumsum(equal.to(tl.int32), axis=0)
        s = tl.where(equal & (place <= left), s, -float("inf"))
        highest = tl.max(s, axis=0)
        token = tl.where((highest > score) | (token < 0) & (seen == 0), start + tl.argmax(s, axis=0), token)
        score = tl.maximum(score, highest)
        seen += tl.sum(equal.to(tl.int32), axis=0)
    return token


@triton.jit
def _row_best(best, row, blocks, WIDE: tl.constexpr):
    places = tl.arange(0, WIDE)
    return tl.max(tl.load(best + row * blocks + places, mask=places < blocks, other=-float("inf")), axis=0)


@triton.jit
def _whole(x):
    """Rounded to even, as torch.round does: adding 1.5 * 2^23 leaves a float32 no room for a fraction."""
    rounded = (x + 12582912.0) - 12582912.0
    return tl.where(x < 4194304.0, rounded, x).to(tl.int64)


@triton.jit
def _keys(seed, position):
    """The two keys of a row: see rwkv_runtime.noise."""
    s, p = _word(seed), _word(position)
    return _mix(s + p * 0x9E3779B9), _mix(s + p * 0x85EBCA6A)


@triton.jit
def _word(x):
    return _mix(_mix(x.to(tl.uint32)) ^ (x >> 32).to(tl.uint32))


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(ids, first, second):
    h = _mix(_mix(ids.to(tl.uint32) ^ first) ^ second)
    u = ((h & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    u = tl.minimum(u, 0.99999994)
    rest = 1.0 - u
    # log1p: the quotient puts back what the subtraction rounded away.
    log_rest = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-log_rest)

"""Nucleus sampling on a GPU without sorting: three kernels. Their naive twin is `Nucleus.filter` and a draw.

The Gumbel-max trick gives every token a noisy score; what is drawn is the highest noisy score among the tokens that
are kept. So the candidates are tried in that order: the mass and the number of the likelier tokens tell whether a
candidate is kept, and the noisiest of those is the next one. A candidate that is not kept rules out all that are no
likelier, which leaves a share of the mass that is uniform in (0, 1): one to three candidates are usual, some ten for a
hostile row.

The blocks of a row are shared by as many programs as it takes to keep a GPU busy: each weighs the first candidate
against its own, and the last of them to be done adds up what they found and tries the others. A block without a token
as likely as the candidate is not read. Masses are whole numbers, so that sums are the same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_runtime import Controls

BLOCK = 2048
WARPS = 8
PROGRAMS = 264
"""That draw at once: two for each multiprocessor of an H100."""
NARROW = 2.0**30
"""Up to this unit a mass fits into an int32, to which a GPU converts four times as fast."""
REACH = tl.constexpr(25.5)
"""More than two tokens' noise is ever apart: it is between -2.9 and 22.2."""


def sample(logits: Tensor, controls: Controls, unit: float, bits: int) -> Tensor:
    """float32 logits [B, V] -> int64 [B], -1 for a row that cannot be drawn from.

    `unit` is the mass of the likeliest token, in which the masses of the others are rounded to whole numbers; `bits`
    are left below a mass for the number of tokens, so that one addition adds both.
    """
    B, V = logits.shape
    blocks = triton.cdiv(V, BLOCK)
    programs = min(blocks, max(1, PROGRAMS // B))
    best = torch.empty((B, blocks), dtype=torch.float32, device=logits.device)
    noisy = torch.empty((B, V), dtype=torch.float32, device=logits.device)
    found = torch.empty((2, B, blocks), dtype=torch.int64, device=logits.device)
    weighed = torch.empty((3, B, programs), dtype=torch.int64, device=logits.device)
    done = torch.empty(B, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(B, dtype=torch.int64, device=logits.device)
    temperature, top_p, top_k = controls["temperature"], controls["top_p"], controls["top_k"]
    stride, narrow, wide = logits.stride(0), unit <= NARROW, triton.next_power_of_2(blocks)
    _best[B, blocks](logits, best, done, stride, V, blocks, BLOCK, num_warps=WARPS)
    _perturb[B, blocks](
        logits, best, noisy, *found, temperature, top_p, controls.seed, controls.position,
        stride, unit, V, blocks, bits, narrow, wide, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    _draw[B, programs](
        logits, best, noisy, *found, *weighed, done, drawn, temperature, top_p, top_k, controls.seed, controls.position,
        stride, unit, V, blocks, programs, bits, narrow, wide, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return drawn


@triton.jit
def _best(logits, best, done, stride, V, blocks, BLOCK: tl.constexpr):
    """The highest logit of each block; inf where one is NaN, so that the row is refused. Nobody is done yet."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    z = tl.where(z != z, float("inf"), z)
    tl.store(best + row * blocks + block, tl.max(z, axis=0))
    tl.store(done + row, 0, mask=block == 0)


@triton.jit
def _perturb(
    logits, best, noisy, mass, noisiest, temperature, top_p, seed, position,
    stride, unit, V, blocks, BITS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The noisy scores (z - z_max) / T + g, where the row is greedy without noise; each block's mass and noisiest.

    A block that no noise lifts to the best token's score is left out: all candidates are likelier than its tokens.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    top = tl.max(_of_row(best, row, blocks, -float("inf"), WIDE), axis=0)
    here = row * blocks + block
    weight = tl.where(ids < V, _weight(z, top, unit, BITS, NARROW), 0)
    tl.store(mass + here, tl.sum(weight, axis=0))
    greedy, divisor = _heat(temperature, top_p, row)
    noisiest_here = tl.full((), -1, tl.int64)
    if (tl.load(best + here) - top) / divisor >= tl.where(greedy, 0.0, -REACH):
        first, second = _keys(tl.load(seed + row), tl.load(position + row))
        score = (z - top) / divisor
        if greedy == 0:
            score += _gumbel(ids, first, second)
        tl.store(noisy + row * V + ids, score, mask=ids < V)
        noisiest_here = _highest(tl.where(ids < V, score, -float("inf")), ids, V)
    tl.store(noisiest + here, noisiest_here)


@triton.jit(do_not_specialize=["programs"])
def _draw(
    logits, best, noisy, mass, noisiest, above, tied, likelier, done, drawn, temperature, top_p, top_k, seed, position,
    stride, unit, V, blocks, programs,
    BITS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighs the first candidate, by the blocks of each program; the last of a row decides, and stores the token."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * stride
    noisy += row * V
    top = tl.max(_of_row(best, row, blocks, -float("inf"), WIDE), axis=0)
    best += row * blocks
    if (top == float("inf")) | (top == -float("inf")):
        tl.store(drawn + row, -1, mask=program == 0)
    else:
        token = _id(tl.max(_of_row(noisiest, row, blocks, -1, WIDE), axis=0))
        z = tl.load(logits + token)
        a, t, noisier = _sweep(
            logits, noisy, best, z, top, unit, V, program, blocks, programs, BITS, NARROW, BLOCK
        )  # fmt: skip
        here = row * programs + program
        tl.store(above + here, a)
        tl.store(tied + here, t)
        tl.store(likelier + here, noisier)
        if tl.atomic_add(done + row, 1, sem="acq_rel") == programs - 1:
            a = tl.sum(_of_row(above, row, programs, 0, WIDE), axis=0)
            t = tl.sum(_of_row(tied, row, programs, 0, WIDE), axis=0)
            noisier = tl.max(_of_row(likelier, row, programs, -1, WIDE), axis=0)
            total = tl.sum(_of_row(mass, row, blocks, 0, WIDE), axis=0) >> BITS
            token = _decide(
                logits, noisy, best, temperature, top_p, top_k, seed, position,
                row, token, z, a, t, noisier, total, top, unit, V, blocks, BITS, NARROW, BLOCK,
            )  # fmt: skip
            tl.store(drawn + row, token.to(tl.int64))


@triton.jit
def _decide(
    logits, noisy, best, temperature, top_p, top_k, seed, position,
    row, token, z, a, t, noisier, total, top, unit, V, blocks,
    BITS: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token that is drawn, given the first candidate and, as `_sweep` has them, the tokens likelier than it."""
    greedy, divisor = _heat(temperature, top_p, row)
    share, k = tl.load(top_p + row), tl.load(top_k + row)
    count = tl.where(greedy, 1, tl.where(k > 0, k, V + 1)).to(tl.int64)
    wanted = tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * share.to(tl.float64)).to(tl.int64), 1), total)
    target = tl.where(share < 1.0, wanted, total + 1)
    while _after_cut(a, target, count, BITS):
        token = _id(noisier)
        z = tl.load(logits + token)
        a, t, noisier = _sweep(logits, noisy, best, z, top, unit, V, 0, blocks, 1, BITS, NARROW, BLOCK)
    if ((a + t) >> BITS >= target) | (_number(a + t, BITS) >= count):
        # At the cut: the tied tokens share what is left, and compete with the likelier ones as the lesser.
        n_tied = _number(t, BITS)
        left = tl.minimum(count - _number(a, BITS), n_tied)
        each = (target - (a >> BITS)).to(tl.float64) / (left.to(tl.float64) * unit)
        cut_down = ((a + t) >> BITS >= target) & (a > 0)
        weight = tl.where(cut_down, tl.minimum(tl.log(each).to(tl.float32), z - top), z - top)
        tie = token  # of all that are tied the noisiest
        if (left < n_tied) & (greedy == 0):
            tie = _noisiest_tie(logits, noisy, z, left, V, BLOCK)
        first, second = _keys(tl.load(seed + row), tl.load(position + row))
        noise = tl.where(greedy, 0.0, _gumbel(tie, first, second))
        rival = tl.where(noisier < 0, tie, _id(noisier))
        beaten = (noisier >= 0) & (tl.load(noisy + rival) > weight / divisor + noise)
        token = tl.where(beaten, rival, tie)
    return token


@triton.jit
def _after_cut(above, target, count, BITS: tl.constexpr):
    """Whether the tokens above a candidate are all that is kept."""
    return (above > 0) & ((above >> BITS >= target) | (_number(above, BITS) >= count))


@triton.jit
def _sweep(
    logits, noisy, best, floor, top, unit, V, first, blocks, step,
    BITS: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of the tokens with z > floor, of those with z == floor, and the noisiest of the former.

    Of the blocks first, first + step, ...; those without such tokens are passed over.
    """
    above = tl.zeros((BLOCK,), tl.int64)
    tied = tl.zeros((BLOCK,), tl.int64)
    score = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.full((BLOCK,), 0, tl.int32) + V
    for block in range(first, blocks, step):
        if tl.load(best + block) >= floor:
            ids = block * BLOCK + tl.arange(0, BLOCK)
            z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
            s = tl.load(noisy + ids, mask=ids < V, other=-float("inf"))
            weight = _weight(z, top, unit, BITS, NARROW)
            inside = (ids < V) & (z > floor)
            above += tl.where(inside, weight, 0)
            tied += tl.where((ids < V) & (z == floor), weight, 0)
            better = inside & (s > score)
            score = tl.where(better, s, score)
            where = tl.where(better, ids, where)
    return tl.sum(above, axis=0), tl.sum(tied, axis=0), _highest(score, where, V)


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
def _of_row(values, row, blocks, other, WIDE: tl.constexpr):
    """What the blocks of a row, or its programs, have left."""
    places = tl.arange(0, WIDE)
    return tl.load(values + row * blocks + places, mask=places < blocks, other=other)


@triton.jit
def _heat(temperature, top_p, row):
    """Whether a row is greedy, and what its logits are divided by."""
    divisor = tl.load(temperature + row)
    greedy = (divisor == 0.0) | (tl.load(top_p + row) == 0.0)
    return greedy, tl.where(greedy, 1.0, divisor)


@triton.jit
def _weight(z, top, unit, BITS: tl.constexpr, NARROW: tl.constexpr):
    """The mass of each token as a whole number, rounded to even as torch.round does, and below it the number 1."""
    mass = tl.exp(z - top) * unit
    mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass)  # 2^23 leaves a fraction no room
    whole = mass.to(tl.int32).to(tl.int64) if NARROW else mass.to(tl.int64)
    return (whole << BITS) + 1


@triton.jit
def _number(weight, BITS: tl.constexpr):
    """How many tokens a sum of weights is of."""
    return weight & ((1 << BITS) - 1)


@triton.jit
def _highest(score, ids, V):
    """The id with the highest score, the lowest among equals, and above it the score; -1 where no score is finite.

    The higher of two such numbers is that of the higher score.
    """
    highest = tl.max(score, axis=0)
    lowest = tl.min(tl.where(score == highest, ids, V), axis=0)
    bits = (highest + 0.0).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return tl.where((highest > -float("inf")) & (lowest < V), (rank << 31) + (0x7FFFFFFF - lowest), -1)


@triton.jit
def _id(noisiest):
    return (0x7FFFFFFF - (noisiest & 0x7FFFFFFF)).to(tl.int32)


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

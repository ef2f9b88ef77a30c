"""Nucleus sampling on a GPU without sorting: three kernels. Their naive twin is `Nucleus.filter` and a draw.

The Gumbel-max trick gives every token a noisy score; what is drawn is the highest noisy score among the tokens that
are kept. So the candidates are tried in that order: the mass and the number of the likelier tokens tell whether a
candidate is kept, and the noisiest of those is the next one. A candidate that is not kept rules out all that are no
likelier, which leaves a share of the mass that is uniform in (0, 1): one to three candidates are usual, some ten for a
hostile row.

Which is the noisiest of a block is told by a bound of the noise that takes a sixth of its instructions: only the few
tokens that may be it are given their noise. Noisy scores are kept nowhere. The blocks' noisiest bound what a block has
for the next candidate; the highest of them is it, unless it is ruled out itself, and its block is looked at again.

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
from rwkv_samplers.kernels.gumbel import gumbel, gumbel_bound, keys
from rwkv_samplers.kernels.packed import highest_of, mass_of, ranked, token_of, tokens_in

BLOCK = 2048
WARPS = 8
GROUP = tl.constexpr(4)
"""Blocks that are weighed at once, where there are many."""
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
    group = 1 if B * blocks <= PROGRAMS else GROUP.value
    programs = min(triton.cdiv(blocks, group), max(1, PROGRAMS // B))
    best = torch.empty((B, blocks), dtype=torch.float32, device=logits.device)
    found = torch.empty((2, B, blocks), dtype=torch.int64, device=logits.device)
    weighed = torch.empty((2, B, programs), dtype=torch.int64, device=logits.device)
    done = torch.empty(B, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(B, dtype=torch.int64, device=logits.device)
    temperature, top_p, top_k = controls["temperature"], controls["top_p"], controls["top_k"]
    stride, narrow, wide = logits.stride(0), unit <= NARROW, triton.next_power_of_2(blocks)
    _best[blocks, B](logits, best, done, stride, V, blocks, BLOCK, num_warps=WARPS)
    _perturb[blocks, B](
        logits, best, *found, temperature, top_p, controls.seed, controls.position,
        stride, unit, V, blocks, bits, narrow, wide, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    _draw[programs, B](
        logits, best, *found, *weighed, done, drawn, temperature, top_p, top_k, controls.seed, controls.position,
        stride, unit, V, blocks, programs, bits, narrow, wide, group, BLOCK, num_warps=WARPS, maxnreg=128,
    )  # fmt: skip
    return drawn


@triton.jit
def _best(logits, best, done, stride, V, blocks, BLOCK: tl.constexpr):
    """The highest logit of each block; inf where one is NaN, so that the row is refused. Nobody is done yet."""
    row, block = _row(True), tl.program_id(0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=-float("inf"))
    z = tl.where(z != z, float("inf"), z)
    tl.store(best + row * blocks + block, tl.max(z, axis=0))
    tl.store(done + row, 0, mask=block == 0)


@triton.jit
def _perturb(
    logits, best, mass, noisiest, temperature, top_p, seed, position,
    stride, unit, V, blocks, BITS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each block's mass, and the token of it with the highest noisy score (z - z_max) / T + g; of a greedy row, without
    noise.

    A block that no noise lifts to the best token's score is left out: all candidates are likelier than its tokens.
    """
    row, block = _row(False), tl.program_id(0)
    logits += row * stride
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
    top = tl.max(_of_row(best, row, blocks, -float("inf"), WIDE), axis=0)
    here = row * blocks + block
    tl.store(mass + here, tl.sum(tl.where(ids < V, mass_of(z, top, unit, NARROW), 0).to(tl.int64), axis=0))
    greedy, divisor = _heat(temperature, top_p, row)
    noisiest_here = tl.full((), -1, tl.int64)
    if (tl.load(best + here) - top) / divisor >= tl.where(greedy, 0.0, -REACH):
        if greedy:
            noisiest_here = highest_of(z - top, ids, V)
        else:
            first, second = keys(tl.load(seed + row), tl.load(position + row))
            noisiest_here = _noisiest(logits, z, ids, -float("inf"), top, divisor, first, second)
    tl.store(noisiest + here, noisiest_here)


@triton.jit(do_not_specialize=["programs"])
def _draw(
    logits, best, mass, noisiest, above, tied, done, drawn, temperature, top_p, top_k, seed, position,
    stride, unit, V, blocks, programs,
    BITS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighs the first candidate, by the blocks of each program; the last of a row decides, and stores the token."""
    row, program = _row(True), tl.program_id(0)
    logits += row * stride
    heights = _of_row(best, row, blocks, -float("inf"), WIDE)
    top = tl.max(heights, axis=0)
    best += row * blocks
    if (top == float("inf")) | (top == -float("inf")):
        tl.store(drawn + row, -1, mask=program == 0)
    else:
        candidates = _of_row(noisiest, row, blocks, -1, WIDE)
        token = token_of(tl.max(candidates, axis=0))
        z = tl.load(logits + token)
        a, t = _weigh(logits, best, z, top, unit, V, program, blocks, programs, BITS, NARROW, TOGETHER, BLOCK)
        here = row * programs + program
        tl.store(above + here, a)
        tl.store(tied + here, t)
        if tl.atomic_add(done + row, 1, sem="acq_rel") == programs - 1:
            a = tl.sum(_of_row(above, row, programs, 0, WIDE), axis=0)
            t = tl.sum(_of_row(tied, row, programs, 0, WIDE), axis=0)
            total = tl.sum(_of_row(mass, row, blocks, 0, WIDE), axis=0)
            token = _decide(
                logits, best, heights, candidates, temperature, top_p, top_k, seed, position,
                row, token, z, a, t, total, top, unit, V, blocks, BITS, NARROW, WIDE, BLOCK,
            )  # fmt: skip
            tl.store(drawn + row, token.to(tl.int64))


@triton.jit
def _decide(
    logits, best, heights, candidates, temperature, top_p, top_k, seed, position,
    row, token, z, a, t, total, top, unit, V, blocks,
    BITS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token that is drawn, given the first candidate and, as `_weigh` has them, the tokens likelier than it."""
    greedy, divisor = _heat(temperature, top_p, row)
    first, second = keys(tl.load(seed + row), tl.load(position + row))
    share, k = tl.load(top_p + row), tl.load(top_k + row)
    count = tl.where(greedy, 1, tl.where(k > 0, k, V + 1)).to(tl.int64)
    wanted = tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * share.to(tl.float64)).to(tl.int64), 1), total)
    target = tl.where(share < 1.0, wanted, total + 1)
    while _after_cut(a, target, count, BITS):
        candidates = _next(logits, heights, candidates, z, top, divisor, first, second, V, WIDE, BLOCK)
        token = token_of(tl.max(candidates, axis=0))
        z = tl.load(logits + token)
        a, t = _weigh(logits, best, z, top, unit, V, 0, blocks, 1, BITS, NARROW, GROUP, BLOCK)
    if ((a + t) >> BITS >= target) | (tokens_in(a + t, BITS) >= count):
        # At the cut: the tied tokens share what is left, and compete with the likelier ones as the lesser.
        n_tied = tokens_in(t, BITS)
        left = tl.minimum(count - tokens_in(a, BITS), n_tied)
        each = (target - (a >> BITS)).to(tl.float64) / (left.to(tl.float64) * unit)
        cut_down = ((a + t) >> BITS >= target) & (a > 0)
        weight = tl.where(cut_down, tl.minimum(tl.log(each).to(tl.float32), z - top), z - top)
        tie = token  # of all that are tied the noisiest
        if (left < n_tied) & (greedy == 0):
            tie = _noisiest_tie(logits, z, left, top, divisor, first, second, V, BLOCK)
        noise = tl.where(greedy, 0.0, gumbel(tie, first, second))
        candidates = _next(logits, heights, candidates, z, top, divisor, first, second, V, WIDE, BLOCK)
        noisier = tl.max(candidates, axis=0)
        rival = tl.where(noisier < 0, tie, token_of(noisier))
        score = (tl.load(logits + rival) - top) / divisor + gumbel(rival, first, second)
        token = tl.where((noisier >= 0) & (score > weight / divisor + noise), rival, tie)
    return token


@triton.jit
def _after_cut(above, target, count, BITS: tl.constexpr):
    """Whether the tokens above a candidate are all that is kept."""
    return (above > 0) & ((above >> BITS >= target) | (tokens_in(above, BITS) >= count))


@triton.jit
def _weigh(
    logits, best, floor, top, unit, V, first, blocks, step,
    BITS: tl.constexpr, NARROW: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mass and number of the tokens with z > floor, and of those with z == floor, each pair in one number.

    Of the groups of blocks first, first + step, ...; those without such tokens are passed over.
    """
    mass = tl.zeros((BLOCK,), tl.int64)
    number = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for group in range(first * TOGETHER, blocks, step * TOGETHER):
        block = group + tl.arange(0, TOGETHER)
        height = tl.load(best + block, mask=block < blocks, other=-float("inf"))
        if tl.max(height, axis=0) >= floor:
            ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            z = tl.load(logits + ids, mask=(ids < V) & (height >= floor)[:, None], other=-float("inf"))
            above = z > floor
            mass += tl.sum(tl.where(above, mass_of(z, top, unit, NARROW), 0).to(tl.int64), axis=0)
            number += tl.sum(above.to(tl.int32), axis=0)
            equal += tl.sum((z == floor).to(tl.int32), axis=0)
    tied = (mass_of(floor, top, unit, NARROW).to(tl.int64) << BITS) + 1
    above = (tl.sum(mass, axis=0) << BITS) + tl.sum(number, axis=0)
    return above, tl.sum(equal, axis=0) * tied


@triton.jit
def _next(
    logits, heights, candidates, floor, top, divisor, first, second, V, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The candidates of a row's blocks, the highest of which is the noisiest of all tokens with z > floor.

    The others may be tokens that are less likely, and bound what their blocks have. -1 where there is none.
    """
    places = tl.arange(0, WIDE)
    candidates = tl.where(heights > floor, candidates, -1)
    highest = tl.max(candidates, axis=0)
    while (highest >= 0) & (tl.load(logits + token_of(highest)) <= floor):
        block = token_of(highest) // BLOCK
        ids = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        found = _noisiest(logits, z, ids, floor, top, divisor, first, second)
        candidates = tl.where(places == block, found, candidates)
        highest = tl.max(candidates, axis=0)
    return candidates


@triton.jit
def _noisiest(logits, z, ids, floor, top, divisor, first, second):
    """Of a block's tokens with z > floor the one with the highest noisy score, as `ranked`; -1 where there is none."""
    inverse = tl.minimum(1.0 / divisor, 3e38)  # rounding is within the bound's reserve for all that may be noisiest
    bound = tl.where(z > floor, (z - top) * inverse + gumbel_bound(ids, first, second), -float("inf"))
    found = tl.full((), -1, tl.int64)
    score = tl.full((), -float("inf"), tl.float32)
    limit = tl.max(bound, axis=0)
    while (limit >= score) & (limit > -float("inf")):
        token = tl.min(tl.where(bound == limit, ids, 0x7FFFFFFF), axis=0)
        own = (tl.load(logits + token) - top) / divisor + gumbel(token, first, second)
        found = tl.maximum(found, ranked(own, token))
        score = tl.maximum(score, own)
        bound = tl.where(ids == token, -float("inf"), bound)
        limit = tl.max(bound, axis=0)
    return found


@triton.jit
def _noisiest_tie(logits, tie, left, top, divisor, first, second, V, BLOCK: tl.constexpr):
    """Of the first `left` tokens with z == `tie`, by their ids, the one with the most noise."""
    seen = 0
    found = tl.full((), -1, tl.int64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        equal = (ids < V) & (z == tie)
        place = seen + tl.cumsum(equal.to(tl.int32), axis=0)
        score = (z - top) / divisor + gumbel(ids, first, second)
        found = tl.maximum(found, highest_of(tl.where(equal & (place <= left), score, -float("inf")), ids, V))
        seen += tl.sum(equal.to(tl.int32), axis=0)
    return token_of(found)


@triton.jit
def _row(BACK: tl.constexpr):
    """The row of a program, from the first or back from the last: what was read last is still in the cache."""
    row = tl.program_id(1).to(tl.int64)
    return tl.num_programs(1) - 1 - row if BACK else row


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

"""Which tokens to keep: those above a floor, or the shortest prefix of an order that weighs enough.

On a CPU the prefix is found without sorting, by radix selection: a histogram over the high bits of an
order-preserving integer tells which bin holds the cutoff, one over the next bits where in that bin, and so on to the
exact value. Nothing waits for the host, and, since all weights are whole numbers, the sums are the same in any order
of addition: on any device, beside any batch-mates.

A row that cannot be drawn from (NaN, +inf, all masked) leaves every function here as one that cannot be drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Where each histogram's bits begin, and how many they are; together all 32."""
SPREAD = 1024
"""Bins for what is out of reach: adding it all to one would make each addition wait for the one before."""
UNIT = 2.0**40
"""The weight of the likeliest token in `mass`: one unit is far below the rounding of a float32 probability."""
SMALL = 4096
"""Vocabularies below this size are sorted: histograms have more bins than they have tokens."""
LAST = 0x7FFFFFFF
"""After the key of every score."""


Short = Callable[[Tensor], Tensor]


class Cut(NamedTuple):
    """Where a prefix ends: within the tokens that have this key."""

    keys: Tensor  # int32 [B, V]
    key: Tensor  # int32 [B, 1]; LAST where the whole row is the prefix
    above: Tensor  # what the tokens before the cut weigh, int64 [B, 1]
    tied: Tensor  # and those at the cut


def order(score: Tensor) -> Tensor:
    """float32 -> int32 keys that grow as the score falls; equal for equal scores alone, 0.0 and -0.0 among them."""
    bits = score.view(torch.int32)
    sign = bits >> 31  # -1 for negative numbers
    size = (bits & 0x7FFFFFFF).bitwise_xor_(sign)
    return torch.sub(sign, size, out=size)


def score_of(key: Tensor) -> Tensor:
    """The score that has this key: the inverse of `order`."""
    signed = -key
    return torch.where(signed < 0, key | -(1 << 31), signed).view(torch.float32)


def mass(logits: Tensor) -> Tensor:
    """Weights in proportion to the probabilities, int64 [B, V], at most UNIT each."""
    return (logits - logits.amax(dim=-1, keepdim=True)).exp_().mul_(UNIT).to(torch.int64)


def ones(logits: Tensor) -> Tensor:
    """A weight of 1 for each token, int64 [B, V]."""
    return torch.ones((1, 1), dtype=torch.int64, device=logits.device).expand_as(logits)


def share_of(total: Tensor, share: Tensor) -> Tensor:
    """What a prefix must weigh to hold a share [B, 1] of all, int64 [B, 1]; out of reach where the share is 1."""
    wanted = (total.double() * share.double()).ceil().to(torch.int64).clamp(min=1)
    return torch.where(share < 1, torch.minimum(wanted, total), total + 1)


def cut(score: Tensor, weight: Tensor, short: Short) -> Cut:
    """The score at which a prefix, from the highest score down, first weighs enough.

    score float32 [B, V]; weight int64 [B, V], not negative; `short` says of sums of weights, int64 [B, N], where
    they are not enough; nothing at all never is.
    """
    keys = order(score)
    # On a GPU sorting is fast, and additions of many threads to few bins are not.
    sort = keys.is_cuda or keys.shape[-1] < SMALL
    return (cut_by_sorting if sort else cut_by_digits)(keys, weight, short)


def cut_by_sorting(keys: Tensor, weight: Tensor, short: Short) -> Cut:
    """The plain way."""
    ranked, ids = keys.sort(dim=-1)
    unfinished = short(weight.gather(-1, ids).cumsum(dim=-1))
    key = ranked.gather(-1, unfinished.sum(dim=-1, keepdim=True).clamp_(max=keys.shape[-1] - 1))
    key = torch.where(unfinished[:, -1:], LAST, key)
    above, tied = (weight * (keys < key)), (weight * (keys == key))
    return Cut(keys, key, above.sum(dim=-1, keepdim=True), tied.sum(dim=-1, keepdim=True))


def cut_by_digits(keys: Tensor, weight: Tensor, short: Short) -> Cut:
    """The same without sorting: each digit of the key in turn, in the bin where the digits before it lead."""
    low = torch.full_like(keys[:, :1], -(1 << 31))
    # Fresh memory costs more than arithmetic here, so each digit uses the same.
    stretch, after, bins = torch.empty_like(keys), torch.empty_like(keys), torch.empty_like(keys, dtype=torch.int64)
    for shift, bits in DIGITS:
        size = 1 << bits
        before = (low >> shift) - 1  # bin 0 holds all that comes before this stretch of keys
        torch.bitwise_right_shift(keys, shift, out=stretch)
        if shift + bits < 32:  # the first stretch holds all keys
            torch.bitwise_and(keys, SPREAD - 1, out=after).add_(before + (size + 1))
            torch.minimum(torch.maximum(stretch, before, out=stretch), after, out=stretch)
        bins.copy_(stretch.sub_(before))
        empty = torch.zeros((len(bins), size + 1 + SPREAD), dtype=torch.int64, device=bins.device)
        sums = empty.scatter_add_(-1, bins, weight).cumsum(dim=-1)  # what the tokens up to each bin weigh together
        unfinished = short(sums)
        place = unfinished[:, : size + 1].sum(dim=-1, keepdim=True).clamp_(1, size)
        low = (before + place.to(torch.int32)) << shift
    above = sums.gather(-1, place - 1)
    return Cut(keys, torch.where(unfinished[:, -1:], LAST, low), above, sums.gather(-1, place) - above)


def prefix(score: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The shortest prefix, from the highest score down, that weighs `target`: bool [B, V]; ties by the lowest id."""
    found = cut(score, weight, lambda sums: sums < target)
    tied = found.keys == found.key
    weight = weight * tied
    earlier = weight.cumsum(dim=-1) - weight
    return (found.keys < found.key) | (tied & (earlier < target - found.above))


def keep(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits where the mask [B, V] is true, -inf elsewhere. It must be true for one token in each row."""
    best = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(~mask & best.isfinite(), -torch.inf)


def at_least(logits: Tensor, floor: Tensor) -> Tensor:
    """The logits from a floor [B, 1] up, -inf elsewhere; the best stay, however high the floor is."""
    best = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < torch.minimum(floor, best), -torch.inf)


def best_id(logits: Tensor) -> Tensor:
    """The lowest id among the maxima, [B, V] -> [B, 1]; argmax promises no order among equals on every device."""
    best = logits.amax(dim=-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[-1] - 1).amin(dim=-1, keepdim=True)


def bounded(logits: Tensor, changed: Tensor) -> Tensor:
    """The changed logits within float32's range; what was not finite stays what it was."""
    limit = torch.finfo(torch.float32).max
    return torch.where(logits.isfinite(), changed.clamp(-limit, limit), logits)

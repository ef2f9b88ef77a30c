"""RWKV's own nucleus sampling: top-k and top-p on the plain probabilities, then temperature on what is kept.

The order and the exact mass are those of BlinkDL's RWKV demo programs: the kept tokens hold exactly
`top_p` before the temperature is applied, the last of them being cut down to fit.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.selection import LAST, Cut, cut, score_of, share_of


class Nucleus(Sampler):
    name = "nucleus"
    summary = "top-k, then exactly the top_p likeliest mass, then temperature (RWKV's own order)"
    params = {
        "temperature": Param(1.0, 0.0, 1000.0, "flattens (> 1) or sharpens (< 1) what is kept; 0 is greedy", off=1.0),
        "top_p": Param(0.8, 0.0, 1.0, "mass of the likeliest tokens that is kept; 0 is greedy", off=1.0),
        "top_k": Param(0, 0, 1 << 31, "how many of the likeliest tokens are kept", off=0),
    }
    runs = "graph"
    refuses = True

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        temperature, top_p, top_k = controls["temperature"], controls["top_p"], controls["top_k"]
        greedy = (temperature == 0) | (top_p == 0)
        count = torch.where(greedy, 1, torch.where(top_k > 0, top_k, logits.shape[-1] + 1))
        packed = Packed.of(logits.shape[-1])
        best = logits.amax(dim=-1, keepdim=True)
        lead = logits - best
        weight = packed.weight(lead)
        target = share_of(packed.mass(weight.sum(dim=-1, keepdim=True)), top_p)
        packed_target = target << packed.bits
        # Both limits are of the plain distribution: whichever is reached first ends the prefix.
        end = cut(logits, weight, lambda sums: (sums < packed_target) & (packed.tokens(sums) < count))
        left = count - packed.tokens(end.above)  # how many of those at the cut fit in
        share = _share_at_the_cut(packed, end, best, target, left)
        # In log space, since p ** (1 / T) underflows to all zeros at a small T; the largest is 0.
        divisor = torch.where(greedy, 1.0, temperature)
        tied = end.keys == end.key
        tied &= tied.cumsum(dim=-1, dtype=torch.int32) <= left.clamp(0, logits.shape[-1]).to(torch.int32)
        beyond = torch.where(tied, share / divisor, -torch.inf)
        return torch.where(end.keys < end.key, lead.div_(divisor), beyond)

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        # torch.compile makes kernels of its own of the plain way.
        if logits.is_cuda and not torch.compiler.is_compiling() and (kernels := _kernels()):
            drawn: Tensor = kernels.sample(logits, controls, *Packed.of(logits.shape[-1]))
            return drawn
        return super().sample(logits, controls)


@cache
def _kernels() -> ModuleType | None:
    """The same draw for GPUs, where Triton is installed."""
    return import_module("rwkv_samplers.kernels.nucleus") if find_spec("triton") else None


class Packed(NamedTuple):
    """Mass and number of tokens in one int64, so that one addition adds both."""

    unit: float  # mass of the likeliest token
    bits: int  # of the number

    @classmethod
    def of(cls, vocab_size: int) -> Packed:
        """As exact as there is room for: 2^-29 of the likeliest token at 65536 tokens."""
        bits = vocab_size.bit_length()
        return cls(2.0 ** (62 - bits - (vocab_size - 1).bit_length()), bits)

    def weight(self, lead: Tensor) -> Tensor:
        """Of tokens with these log probabilities, relative to the likeliest one's."""
        whole = lead.exp().mul_(self.unit).round_()
        return whole.mul_(2.0**self.bits).to(torch.int64).add_(1)

    def mass(self, weight: Tensor) -> Tensor:
        return weight >> self.bits

    def tokens(self, weight: Tensor) -> Tensor:
        return weight & ((1 << self.bits) - 1)


def _share_at_the_cut(packed: Packed, end: Cut, best: Tensor, target: Tensor, left: Tensor) -> Tensor:
    """The log weight [B, 1], relative to the best token's, of each kept token at the cut.

    They share what is left of the mass, where it is the mass that ends the prefix, and keep their own otherwise; where
    top-k lets only some of them in, these do not grow beyond their own.
    """
    above, tied = packed.mass(end.above), packed.mass(end.tied)
    each = (target - above).double() / (torch.minimum(packed.tokens(end.tied), left) * packed.unit)
    own = score_of(end.key) - best
    share = torch.where(above + tied >= target, torch.minimum(each.log().float(), own), own)
    # Nothing is cut down where the cut is at the best token and its equals, or where there is none.
    share = torch.where((packed.tokens(end.above) == 0) | (end.key == LAST), 0.0, share)
    return torch.where(best.isfinite(), share, torch.nan)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Nucleus()]

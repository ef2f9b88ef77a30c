"""Exclude top choices: now and then, all likely tokens but the least likely of them are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.selection import keep


class Xtc(Sampler):
    """P. E. Weidmann's XTC (text-generation-webui, pull request 6335, 2024).

    With probability q: of all tokens with p >= t only the least likely stays, the one with the highest id among
    equals. Where fewer than two reach t, nothing changes.
    """

    name = "xtc"
    summary = "with probability xtc_probability, drops all tokens that reach xtc_threshold but the least likely of them"
    params = {
        "xtc_probability": Param(0.5, 0.0, 1.0, "how often, as a share of the tokens drawn", off=0.0),
        "xtc_threshold": Param(0.1, 0.0, 1.0, "probability from which a token is a top choice; above 0.5 none is lost"),
    }
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        top = (p >= controls["xtc_threshold"]) & (logits > -torch.inf)
        least = torch.where(top, logits, torch.inf).amin(dim=-1, keepdim=True)
        spared = torch.where(top & (logits == least), controls.ids, -1).amax(dim=-1, keepdim=True)
        now = controls.uniform(1) < controls["xtc_probability"]
        return keep(logits, ~(top & now) | (controls.ids == spared))


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Xtc()]

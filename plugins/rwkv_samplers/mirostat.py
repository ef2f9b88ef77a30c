"""Mirostat: holds the surprise of the text near a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, TensorSpec, hookimpl
from rwkv_samplers.selection import at_least


class Mirostat(Sampler):
    """Version 2 of Basu et al., Mirostat (2021): tokens with -log2 p > mu are dropped; mu -= eta (surprise - tau).

    mu begins at 2 tau. The surprise is that of the drawn token in the distribution this sampler is given, as in
    the authors' program; llama.cpp takes it after the truncation.
    """

    name = "mirostat"
    summary = "drops tokens more surprising than a bound that is steered towards mirostat_tau bits a token (version 2)"
    params = {
        "mirostat_tau": Param(5.0, 0.0, 100.0, "the surprise aimed at, in bits a token"),
        "mirostat_eta": Param(0.1, 0.0, 1.0, "how fast the bound follows; at 0 it stays at twice mirostat_tau"),
    }
    runs = "graph"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {"mirostat_shift": TensorSpec((1,), torch.float32)}  # mu - 2 tau: memory begins at zero

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        mu = 2 * controls["mirostat_tau"] + controls.slots["mirostat_shift"]
        return at_least(logits, logits.logsumexp(dim=-1, keepdim=True) - mu * math.log(2))

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        token = tokens[:, None]
        log_p = torch.log_softmax(logits, dim=-1).gather(-1, token.clamp(min=0))
        step = controls["mirostat_eta"] * (-log_p / math.log(2) - controls["mirostat_tau"])
        controls.slots["mirostat_shift"].sub_(torch.where((token >= 0) & step.isfinite(), step, 0.0))


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Mirostat()]

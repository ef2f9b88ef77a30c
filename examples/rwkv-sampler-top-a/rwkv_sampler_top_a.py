"""Top-a sampling: a token stays if its probability is at least top_a * p_max ** 2.

The floor moves with the model's confidence: at p_max = 0.9 and top_a = 0.2 only the best token stays, at
p_max = 0.1 whatever has a probability of 0.002 does. Source: "The top-a sampling method" in the README of
https://github.com/BlinkDL/RWKV-LM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl


class TopA(Sampler):
    name = "top-a"
    summary = "keeps p >= top_a * p_max^2: the surer the model, the fewer tokens"
    params = {"top_a": Param(0.2, low=0.0, high=1.0, help="share of the best token's squared probability", off=0.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1)  # [B, V]
        floor = controls["top_a"].log() + 2 * log_p.amax(dim=-1, keepdim=True)  # [B, 1]; ln 0 = -inf keeps all
        return logits.masked_fill(log_p < floor, -torch.inf)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [TopA()]

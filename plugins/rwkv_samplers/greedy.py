"""The likeliest token, always."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Sampler, hookimpl
from rwkv_samplers.selection import best_id, keep


class Greedy(Sampler):
    name = "greedy"
    summary = "the likeliest token, always; the lowest id among equals"
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return keep(logits, controls.ids == best_id(logits))

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        return torch.where(logits.amax(dim=-1).isfinite(), best_id(logits).squeeze(-1), -1)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Greedy()]

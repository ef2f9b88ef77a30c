"""The likeliest token, always."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Sampler, hookimpl


def best_id(logits: Tensor) -> Tensor:
    """The lowest id among the maxima, [B, V] -> [B, 1]; argmax promises no order among equals."""
    best = logits.amax(dim=-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[-1] - 1).amin(dim=-1, keepdim=True)


class Greedy(Sampler):
    name = "greedy"
    summary = "the likeliest token, always; the lowest id among equals"
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        # What is not a number stays, so that the draw after this refuses the row.
        return logits.masked_fill((controls.ids != best_id(logits)) & ~logits.isnan(), -torch.inf)

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        return torch.where(logits.amax(dim=-1).isfinite(), best_id(logits).squeeze(-1), -1)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Greedy()]

"""Temperature: logits divided by T."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.selection import best_id, keep

TEMPERATURE = Param(1.0, 0.0, 1000.0, "flattens (> 1) or sharpens (< 1) the distribution; 0 is greedy", off=1.0)


def tempered(logits: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
    """(z - z_max) / T, [B, V]; the lowest id among the maxima alone where T [B, 1] is 0.

    The maximum is taken off first, so that the division by a small T overflows to -inf alone.
    """
    cold = temperature == 0
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(cold, 1.0, temperature)
    return keep(scaled, ~cold | (ids == best_id(logits)))


class Temperature(Sampler):
    """softmax(z / T), after Ackley, Hinton and Sejnowski (1985)."""

    name = "temperature"
    summary = "logits divided by the temperature"
    params = {"temperature": TEMPERATURE}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return tempered(logits, controls["temperature"], controls.ids)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Temperature()]

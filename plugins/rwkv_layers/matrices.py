"""Large weights as they are loaded: dense, or rounded to 8 bits with one scale for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rwkv_layers.linear import Matrix
from rwkv_runtime import Place

QUANTIZATIONS = ("int8",)
BLOCK = 1 << 20
"""Weights quantized at a time, so that their float32 copies stay small beside the model."""


def matrix(place: Place, tensors: Mapping[str, Tensor], name: str, factor: float = 1.0) -> Matrix:
    """The tensor [D, C] of that name times `factor`, quantized where `place` says so."""
    tensor = tensors[name]
    if place.quant is None:
        return Matrix(place(name, tensor * factor if factor != 1.0 else tensor), None)
    D, C = tensor.shape
    start, weight, scale = 0, torch.empty(0), torch.empty(0)
    for block in torch.split(tensor, max(1, BLOCK // C)):
        values, steps = quantize(place(name, block, torch.float32))
        if start == 0:  # where the whole is to lie, `place` knows
            weight, scale = values.new_empty(D, C), steps.new_empty(D)
        end = start + block.shape[0]
        weight[start:end], scale[start:end] = values, steps
        start = end
    return Matrix(weight, scale * factor)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [D, C] -> int8 [D, C], the nearest of 255 steps from minus to plus each row's largest, and the steps [D].

    A step is rounded to bfloat16, so that a product in any type multiplies with the same number; that moves a
    row's largest value by a quarter of a step, the others by less.
    """
    scale = (torch.linalg.vector_norm(weight, torch.inf, dim=1) / 127).to(torch.bfloat16).float()
    scale.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays zero
    return (weight / scale.unsqueeze(1)).round_().to(torch.int8), scale


def stacked(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one shape as one."""
    scales = [m.scale for m in matrices if m.scale is not None]
    return Matrix(torch.stack([m.weight for m in matrices]), torch.stack(scales) if scales else None)

"""A model as the one that is being read, but small and of zeros: for what a backend does beside the reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rwkv_runtime.model import Architecture, Model, ModelConfig

LAYERS, IDS = 2, 16
"""Enough for a first layer and a last, and for a row of logits that is as well aligned as a long one."""


def blank_model(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> Model:
    """As these tensors would make, but of two layers and, where ids are many, with 16 of them. Nothing is read."""
    few = replace(config, n_layer=min(LAYERS, config.n_layer))
    place = _Blank(config, device, dtype)
    weights = architecture.weights(tensors, few, place, dtype)
    return Model(architecture, replace(few, vocab_size=place.ids), weights, device, dtype, state_dtype=state_dtype)


class _Blank:
    """Zeros where a tensor would be placed."""

    quant: str | None = None

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.vocab_size = device, dtype, config.vocab_size
        self.ids = IDS if config.vocab_size > max(config.n_embd, config.n_ffn) else config.vocab_size

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        rows, *rest = tensor.shape
        return torch.zeros(
            (self.ids if rows == self.vocab_size else rows, *rest), dtype=dtype or self.dtype, device=self.device
        )

"""A small model of the kind that is trained, and text of two sources for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from training.data import Windows
from training.model import ModelConfig, StoryModel

TINY = ModelConfig(vocab_size=300, width=128, layers=2, dropout=0.1)


def shaken_model(config: ModelConfig) -> StoryModel:
    """A model none of whose parameters is at its start, where many are zero."""
    torch.manual_seed(3)
    model = StoryModel(replace(config, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text_windows() -> Windows:
    generator = torch.Generator().manual_seed(2)
    arrays = [torch.randint(1, 300, (3000,), generator=generator, dtype=torch.int32) for _ in range(2)]
    for array in arrays:
        array[::100] = 0
    return Windows.from_arrays(["one", "two"], arrays, torch.device("cpu"))

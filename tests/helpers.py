"""Small things the tests share: tiny models, their logits, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.controls import Controls
from rwkv_runtime.model import Architecture, Model, ModelConfig
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.sampler import Sampler, check_params
from rwkv_runtime.tokenizer import Tokenizer

CPU = torch.device("cpu")
BYTES = {byte + 1: bytes((byte,)) for byte in range(256)}
VOCAB_SIZE = 260  # three more than the byte vocabulary has: ids 257 to 259 must never be drawn
PRESENT = slice(0, 257)
"""The ids of the byte vocabulary."""
Tensors = dict[str, Tensor]


def only(architecture: str) -> pytest.MarkDecorator:
    """Runs a test with one architecture instead of each in turn."""
    return pytest.mark.parametrize("architecture", [architecture], indirect=True)


def byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_tokens(BYTES)


def tiny_config(architecture: Architecture, layers: int = 2, head_size: int = 16) -> ModelConfig:
    config = architecture.sizes(layers, 32, VOCAB_SIZE, head_size)
    return replace(config, ranks=dict.fromkeys(config.ranks, 8))


def loaded(path: Path, plugins: Plugins, dtype: torch.dtype | None = None) -> Model:
    """The model in a file, on the CPU."""
    return build_model(open_tensors(path), plugins.architectures, CPU, dtype, str(path))


def built(tensors: Mapping[str, Tensor], plugins: Plugins, dtype: torch.dtype | None = None) -> Model:
    return build_model(tensors, plugins.architectures, CPU, dtype)


def logits_of(model: Model, tokens: Sequence[int], pieces: Sequence[int] = ()) -> Tensor:
    """Logits after every token, [T, V], read in pieces of these lengths, the rest at once."""
    state = model.new_state()
    lengths = [*pieces, len(tokens) - sum(pieces)]
    parts = torch.tensor([list(tokens)]).split([n for n in lengths if n], dim=1)
    architecture = model.architecture
    rows = [architecture.forward(architecture.ops, model.weights, part, state, every=True)[0] for part in parts]
    return torch.cat(rows)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value in the second."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def off(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, relative to the norm of the second: one stray rounding does not decide it."""
    assert ours.shape == theirs.shape
    return (
        torch.linalg.vector_norm(ours.double() - theirs.double()) / torch.linalg.vector_norm(theirs.double())
    ).item()


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """Random tokens of the byte vocabulary."""
    return torch.randint(1, 257, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def controls_of(sampler: Sampler, rows: int, vocab_size: int, seed: int = 0, **params: object) -> Controls:
    """Controls for rows at positions 0, 1, ...; a parameter is one value for all rows, or a list."""
    controls = Controls.allocate(sampler, rows, vocab_size, CPU)
    for row in range(rows):
        values = {name: v[row] if isinstance(v, list) else v for name, v in params.items()}
        controls.set(row, check_params(sampler, values), seed, row)
    return controls


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    """How likely counts at least this far from the expected ones are, if these are right."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()

"""Whole models in kernels: what `eager` gives, and what the float64 reference says."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from helpers import CPU, Tensors, apart, built, logits_of, off, tokens_of
from rwkv_backends.fused import FAMILIES, Fused
from rwkv_backends.kernels.tuning import Tuning
from torch import Tensor

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.testing import check_backend

FEW = Tuning(overlap=False, programs=4, tile_rows=32, piece_rows=32)
"""Every decode step of up to two rows through the kernels that hold whole rows of a matrix; large tiles, for speed."""
PIECES = replace(FEW, pieces_from=1)
MANY = replace(FEW, vector_rows=0)


def read(model: Model, tuning: Tuning, tokens: Tensor, pieces: list[int]) -> Tensor:
    """Logits after every token of [B, T], read in pieces of these lengths."""
    family = import_module(FAMILIES[model.architecture.name])
    forward, state = family.forward(model, tuning), model.new_state(len(tokens))
    return torch.cat([forward(part, state, every=True) for part in tokens.split(pieces, dim=1)], 1)


def random(architecture: Architecture, layers: int, embd: int, head_size: int, vocab: int, rank: int) -> Tensors:
    config = architecture.sizes(layers, embd, vocab, head_size)
    return architecture.random(replace(config, ranks=dict.fromkeys(config.ranks, rank)))


def test_it_keeps_the_contract_of_a_backend(plugins: Plugins) -> None:
    check_backend(Fused(FEW), [plugins.architectures.get(name) for name in FAMILIES], n_layer=1, n_embd=16)


@pytest.mark.parametrize(("embd", "head_size", "vocab", "rank"), [(48, 16, 37, 5), (64, 64, 5, 20)])
def test_logits_are_those_of_the_reference(
    architecture: Architecture, plugins: Plugins, embd: int, head_size: int, vocab: int, rank: int
) -> None:
    """For sizes that are no powers of two, too."""
    tensors = random(architecture, 2, embd, head_size, vocab, rank)
    model = built(tensors, plugins)
    tokens = torch.tensor([[t % vocab for t in tokens_of(22)]])
    expected = architecture.reference(tensors, tokens[0].tolist())
    for tuning in (FEW, PIECES, MANY):
        assert apart(read(model, tuning, tokens, [1, 1, 18, 2])[0], expected) < 1e-4


@pytest.mark.parametrize("tuning", [FEW, MANY, replace(MANY, span=16)], ids=["few", "many", "spans"])
def test_a_state_may_be_kept_in_16_bits(architecture: Architecture, plugins: Plugins, tuning: Tuning) -> None:
    """Computed with in float32, rounded once a call."""
    model = built(random(architecture, 1, 48, 16, 37, 5), plugins)
    forward = import_module(FAMILIES[architecture.name]).forward(model, tuning)
    tokens = torch.tensor([[t % 37 for t in tokens_of(40, seed)] for seed in range(2)])
    full, half = model.new_state(2), replace(model, state_dtype=torch.float16).new_state(2)
    for part in tokens.split([1, 1, 37, 1], dim=1):
        exact, rounded = forward(part, full), forward(part, half)
        assert apart(rounded, exact) < 1e-6
        kept = full["att_kv"].half()
        assert apart(half["att_kv"].float(), kept.float()) < 2e-3
        half["att_kv"].copy_(kept)  # both go on from the same
        full["att_kv"].copy_(kept)


@pytest.mark.parametrize(("dtype", "layers"), [(torch.bfloat16, 1), (torch.float16, 7)], ids=str)
def test_halves_are_as_near_to_the_reference_as_plain_pytorch_is(
    plugins: Plugins, dtype: torch.dtype, layers: int
) -> None:
    """Of seven layers, float16 halves the residual stream after the sixth."""
    architecture = plugins.architectures.get("rwkv6")
    tensors = {name: t.to(dtype) for name, t in random(architecture, layers, 32, 16, 33, 8).items()}
    model = built(tensors, plugins)
    tokens = [t % 33 for t in tokens_of(24)]  # of few, chance decides
    expected = architecture.reference(tensors, tokens)
    plain = off(logits_of(model, tokens), expected)
    for tuning in (FEW, MANY):
        assert off(read(model, tuning, torch.tensor([tokens]), [1, 22, 1])[0], expected) < 1.5 * plain


def test_int8_weights_give_what_plain_pytorch_makes_of_them(architecture: Architecture, plugins: Plugins) -> None:
    tensors = random(architecture, 2, 48, 16, 37, 5)
    model = build_model(tensors, plugins.architectures, CPU, quant="int8")
    tokens = [t % 37 for t in tokens_of(9)]
    expected = logits_of(model, tokens)
    for tuning in (FEW, PIECES, MANY):
        assert apart(read(model, tuning, torch.tensor([tokens]), [1, 7, 1])[0], expected) < 1e-4


def test_the_same_twice(architecture: Architecture, plugins: Plugins) -> None:
    model = built(random(architecture, 1, 32, 16, 33, 8), plugins)
    tokens = torch.tensor([[t % 33 for t in tokens_of(21)]] * 2)
    first, second = (read(model, FEW, tokens, [18, 1, 2]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])  # whichever row

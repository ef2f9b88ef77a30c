"""Prompts that are filled up: neither the state nor the last logits know of it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from drawn import TUNING
from helpers import CPU, apart, tokens_of
from rwkv_backends.fused import FAMILIES

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture

SIZE, V = 40, 37


@pytest.mark.parametrize("length", [2, 16, 33, 40])
def test_what_is_filled_up_says_what_it_says_alone(architecture: Architecture, length: int) -> None:
    """In spans of 16 tokens, of which some are all padding; whatever the padding is."""
    config = architecture.sizes(2, 48, V, 16)
    config = replace(config, ranks=dict.fromkeys(config.ranks, 5))
    model = build_model(architecture.random(config), [architecture], CPU)
    forward = import_module(FAMILIES[architecture.name]).forward(model, replace(TUNING, span=16))
    tokens = torch.tensor([tokens_of(SIZE)]) % V
    other = torch.cat([tokens[:, :length], (tokens[:, length:] + 1) % V], 1)
    states = [model.new_state() for _ in range(3)]
    for state in states:
        forward(torch.tensor([[3, 1, 4]]), state)
    alone = forward(tokens[:, :length], states[0])
    there = torch.tensor([length])
    filled = [forward(tokens, states[1], length=there), forward(other, states[2], length=there)]
    assert apart(filled[0], alone) < 1e-5
    assert torch.equal(*filled)
    for name, t in states[0].tensors.items():
        assert apart(states[1][name], t) < 1e-5
        assert torch.equal(states[1][name], states[2][name])

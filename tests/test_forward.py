"""Logits and states for those who want no text: the caller's state is never changed."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, apart, built, logits_of, tiny_config, tokens_of

from rwkv_runtime.backend import chunk_size
from rwkv_runtime.errors import OptionError, StateError
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime

TOKENS = tokens_of(chunk_size(CPU) + 30)


def test_logits_of_the_last_token_and_of_every_token(runtime: Runtime, model: Model) -> None:
    expected = logits_of(model, TOKENS)
    every, (last, _) = runtime.logits(TOKENS), runtime.forward(TOKENS)
    assert (every.dtype, every.shape, last.shape) == (torch.float32, (len(TOKENS), 260), (260,))
    assert apart(every, expected) < 1e-5
    assert apart(last, expected[-1]) < 1e-5


def test_a_state_carries_on_and_is_not_changed(runtime: Runtime) -> None:
    _, state = runtime.forward(TOKENS[:20])
    before = state.clone()
    first, after = runtime.forward(TOKENS[20:30], state)
    second, _ = runtime.forward(TOKENS[20:30], state)
    assert torch.equal(first, second)
    assert all(torch.equal(state[name], t) for name, t in before.tensors.items())
    assert not torch.equal(after["att_kv"], state["att_kv"])
    assert apart(first, runtime.forward(TOKENS[:30])[0]) < 1e-5
    assert apart(runtime.logits(TOKENS[20:30], state)[-1], first) < 1e-5


def test_one_row_of_a_batch_is_a_state(runtime: Runtime, model: Model) -> None:
    _, one = runtime.forward(TOKENS[:20])
    batch = model.new_state(3)
    batch.copy(one, 0, 2)
    assert torch.equal(runtime.forward([5], batch.view(2, 3))[0], runtime.forward([5], one)[0])
    with pytest.raises(StateError, match="a state of 3 rows"):
        runtime.forward([5], batch)


def test_what_cannot_be_read_is_refused(runtime: Runtime, architecture: Architecture, plugins: Plugins) -> None:
    for tokens in ([], [260], [-1], [3, 1 << 40]):
        for read in (runtime.forward, runtime.logits):
            with pytest.raises(OptionError, match="each from 0 to 259"):
                read(tokens)
    for tokens in ("text", 5, [1.5], None):
        with pytest.raises(OptionError, match="token ids are a list of whole numbers"):
            runtime.forward(tokens)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="a state is what `forward` gives, not str"):
        runtime.forward([1], "state")  # type: ignore[arg-type]
    other = built(architecture.random(tiny_config(architecture, layers=3)), plugins).new_state()
    with pytest.raises(StateError, match="a model of another size"):
        runtime.forward([1], other)

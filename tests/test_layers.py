"""Every architecture computes what its definition says: one implementation for one token, many, and any split.

The oracle is its naive float64 recurrence. Differences are relative to the largest logit.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import Tensors, apart, built, logits_of, tiny_config, tokens_of
from torch import Tensor

from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins

FLOAT32 = 1e-4
"""What is promised; 1e-6 is usual."""
BFLOAT16 = 0.05
"""Of two layers of random weights."""
TOKENS = tokens_of(1000)


@pytest.fixture(scope="module")
def reference(architecture: Architecture, checkpoint: Tensors) -> Tensor:
    """float64 logits after each of the thousand tokens."""
    return architecture.reference(checkpoint, TOKENS)


def test_a_thousand_tokens_at_once_agree_with_the_oracle(model: Model, reference: Tensor) -> None:
    assert apart(logits_of(model, TOKENS), reference) < FLOAT32


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 32, 33, 512, 513])
def test_any_split_agrees_with_the_oracle(size: int, model: Model, reference: Tensor) -> None:
    count = min(len(TOKENS), 12 * size + 5)
    pieces = [size] * (count // size)
    assert apart(logits_of(model, TOKENS[:count], pieces), reference[:count]) < FLOAT32


def test_mixed_splits_leave_the_same_state(model: Model) -> None:
    states = []
    for cuts in ([], [1], [16], [17, 18], [5, 21, 22, 60], list(range(1, 70))):
        state = model.new_state()
        for start, stop in pairwise([0, *cuts, 70]):
            part = torch.tensor([TOKENS[start:stop]])
            model.architecture.forward(model.architecture.ops, model.weights, part, state)
        states.append(state)
    for other in states[1:]:
        for name, t in states[0].tensors.items():
            assert apart(other[name], t) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BFLOAT16), (torch.float16, 0.01)])
def test_half_types_stay_near_the_oracle_on_the_same_rounded_weights(
    dtype: torch.dtype, tolerance: float, architecture: Architecture, checkpoint: Tensors, plugins: Plugins
) -> None:
    rounded = {name: t.to(dtype) for name, t in checkpoint.items()}
    ours = logits_of(built(rounded, plugins), TOKENS[:200])
    assert apart(ours, architecture.reference(rounded, TOKENS[:200])) < tolerance


@pytest.mark.parametrize("head_size", [1, 4, 32])
def test_other_head_sizes_agree_with_the_oracle(head_size: int, architecture: Architecture, plugins: Plugins) -> None:
    tensors = architecture.random(tiny_config(architecture, 3, head_size), seed=head_size)
    ours = logits_of(built(tensors, plugins), TOKENS[:60])
    assert apart(ours, architecture.reference(tensors, TOKENS[:60])) < FLOAT32


def test_rows_of_a_batch_do_not_touch_each_other(model: Model) -> None:
    a = model.architecture
    tokens = torch.tensor([TOKENS[row * 40 : row * 40 + 40] for row in range(4)])
    state = model.new_state(4)
    together = a.forward(a.ops, model.weights, tokens, state, every=True)
    for row in range(4):
        alone = model.new_state()
        assert apart(together[row], a.forward(a.ops, model.weights, tokens[row : row + 1], alone, every=True)[0]) < 1e-5
        assert apart(state["att_kv"][:, row], alone["att_kv"][:, 0]) < 1e-5
    spoiled = model.new_state(4)
    spoiled["att_kv"][:, 2] = torch.nan
    again = a.forward(a.ops, model.weights, tokens, spoiled, every=True)
    assert torch.equal(again[[0, 1, 3]], together[[0, 1, 3]])
    assert bool(again[2].isnan().all())


def test_the_state_is_updated_in_place_and_only_the_last_logits_are_given(model: Model) -> None:
    a = model.architecture
    state = model.new_state(2)
    addresses = [t.data_ptr() for t in state.tensors.values()]
    tokens = torch.tensor([TOKENS[:20], TOKENS[20:40]])
    last = a.forward(a.ops, model.weights, tokens, state)
    assert [t.data_ptr() for t in state.tensors.values()] == addresses
    assert all(bool((t != 0).any()) for t in state.tensors.values())
    every = a.forward(a.ops, model.weights, tokens, model.new_state(2), every=True)
    assert (last.shape, every.shape) == ((2, 260), (2, 20, 260))
    assert apart(last, every[:, -1]) < 1e-6


def test_a_part_of_a_batch_is_a_batch(model: Model) -> None:
    a = model.architecture
    state, alone = model.new_state(5), model.new_state(2)
    tokens = torch.tensor([[5], [6]])
    seen = a.forward(a.ops, model.weights, tokens, state.view(1, 3))
    assert torch.equal(seen, a.forward(a.ops, model.weights, tokens, alone))
    assert torch.equal(state["att_kv"][:, 1:3], alone["att_kv"])
    assert not bool(state["att_kv"][:, [0, 3, 4]].any())


def test_torchscript_versions_of_the_ops_are_equal(model: Model) -> None:
    a = model.architecture
    scripted = {name: torch.jit.script(op) for name, op in a.ops.items()}
    for count in (1, 16, 40):
        tokens = torch.tensor([TOKENS[:count], TOKENS[count : 2 * count]])
        ours, theirs = model.new_state(2), model.new_state(2)
        for _ in range(3):  # TorchScript specialises what it runs again
            eager = a.forward(a.ops, model.weights, tokens, ours, every=True)
            assert apart(a.forward(scripted, model.weights, tokens, theirs, every=True), eager) < 1e-5
        assert apart(theirs["att_kv"], ours["att_kv"]) < 1e-5

"""The recurrent state kept in float16: computed with in float32, rounded once a call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import rwkv_run
from helpers import CPU, Tensors, apart, tiny_config, tokens_of
from rwkv_backends.eager import Eager
from rwkv_backends.native import Native

import rwkv_runtime
from rwkv_runtime import OptionError
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins


def pair(architecture: Architecture, plugins: Plugins) -> list[Model]:
    """The same weights with either state."""
    tensors = architecture.random(tiny_config(architecture))
    return [build_model(tensors, plugins.architectures, CPU, state_dtype=d) for d in (torch.float32, torch.float16)]


@pytest.mark.parametrize("backend", ["eager", "script"])
def test_it_is_rounded_once_a_call(architecture: Architecture, plugins: Plugins, backend: str) -> None:
    full, half = pair(architecture, plugins)
    assert half.new_state()["att_kv"].dtype == torch.float16
    runs = [(plugins.backends.get(backend).forward(model), model.new_state()) for model in (full, half)]
    (exact, wide), (rounded, narrow) = runs
    vocab_size = full.config.vocab_size
    for part in torch.tensor([[t % vocab_size for t in tokens_of(40)]]).split([1, 1, 37, 1], dim=1):
        assert apart(rounded(part, narrow), exact(part, wide)) < 1e-6
        assert torch.equal(narrow["att_kv"], wide["att_kv"].half())
        wide.copy(narrow, 0, 0)  # as a saved state goes from one kind to the other


def test_what_is_too_large_becomes_the_largest_number(architecture: Architecture, plugins: Plugins) -> None:
    half = pair(architecture, plugins)[1]
    forward, state = plugins.backends.get("eager").forward(half), half.new_state()
    state["att_kv"].fill_(65504.0)
    assert bool(forward(torch.tensor([[1]]), state).isfinite().all())
    assert bool(state["att_kv"].isfinite().all())


def test_native_leaves_it_to_others(architecture: Architecture, plugins: Plugins) -> None:
    full, half = pair(architecture, plugins)
    native = Native()
    if native.why_not(full) is None:
        assert native.why_not(half) == "it does not know states of torch.float16"


@pytest.mark.parametrize("value", ["bfloat16", "half", ""])
def test_another_name_is_refused_before_anything_is_loaded(value: str) -> None:
    result = rwkv_run(Path("missing.pth"), "hello", "--state-dtype", value)
    assert result.exit_code == 2
    assert f"there is no state dtype {value!r}; there are float32, float16" in result.stderr
    with pytest.raises(OptionError, match="there is no state dtype"):
        rwkv_runtime.load("missing.pth", state_dtype=value)


def test_an_architecture_that_has_none_says_so(checkpoint: Tensors, plugins: Plugins) -> None:
    class Plain(type(next(iter(plugins.architectures)))):  # type: ignore[misc]
        rounded = ()

    family = Plain()
    with pytest.raises(OptionError, match=r"^tiny: rwkv\d has no state in 16 bits$"):
        build_model(family.random(tiny_config(family)), [family], CPU, source="tiny", state_dtype=torch.float16)


def test_the_story_model_loses_next_to_nothing() -> None:
    runtimes = [rwkv_runtime.load(dtype="float32", backend="eager", state_dtype=d) for d in ("float32", "float16")]
    text = "Once upon a time there was a fox who lived in a wood with her three cubs."
    runs = [(Eager().forward(runtime.model), runtime.model.new_state()) for runtime in runtimes]
    moved = []
    for token in runtimes[0].tokenizer.encode(text):
        exact, rounded = (forward(torch.tensor([[token]]), s).double().log_softmax(-1) for forward, s in runs)
        moved.append((exact.exp() * (exact - rounded)).sum().item())
    assert 0 < sum(moved) / len(moved) < 5e-6

"""The recurrent state kept in float16: computed with in float32, rounded once a call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import rwkv_run, save_tiny_model
from helpers import CPU, Tensors, apart, tiny_config, tokens_of
from rwkv_backends.eager import Eager
from rwkv_backends.native import Native

import rwkv_runtime
from rwkv_runtime import OptionError, StateError
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.snapshot import Snapshot, load_snapshot, save_snapshot


def pair(architecture: Architecture, plugins: Plugins) -> list[Model]:
    """The same weights with either state."""
    tensors = architecture.random(tiny_config(architecture))
    return [build_model(tensors, plugins.architectures, CPU, state_dtype=d) for d in (torch.float32, torch.float16)]


@pytest.mark.parametrize("backend", ["eager", "script", "compile"])
def test_it_is_rounded_once_a_call(architecture: Architecture, plugins: Plugins, backend: str) -> None:
    if reason := plugins.backends.get(backend).why_not(None):
        pytest.skip(reason)
    full, half = pair(architecture, plugins)
    assert half.new_state()["att_kv"].dtype == torch.float16
    runs = [(plugins.backends.get(backend).forward(model), model.new_state()) for model in (full, half)]
    (exact, wide), (rounded, narrow) = runs
    vocab_size = full.config.vocab_size
    for part in torch.tensor([[t % vocab_size for t in tokens_of(40)]]).split([1, 1, 37, 1], dim=1):
        assert apart(rounded(part, narrow), exact(part, wide)) < 1e-6
        assert torch.equal(narrow["att_kv"], wide["att_kv"].half())
        wide.copy(narrow, 0, 0)


def test_what_is_too_large_becomes_the_largest_number(architecture: Architecture, plugins: Plugins) -> None:
    full, half = (model.new_state() for model in pair(architecture, plugins))
    full["att_kv"].fill_(1e6)
    full["att_kv"][0, 0, 0, 0, :2] = torch.tensor([-1e6, torch.nan])
    kept = full["att_kv"].clamp(-65504, 65504).half()
    half.copy(full, 0, 0)
    torch.testing.assert_close(half["att_kv"], kept, rtol=0, atol=0, equal_nan=True)
    half["att_kv"].zero_()
    half.keep("att_kv", 0, full["att_kv"][0])
    torch.testing.assert_close(half["att_kv"][0], kept[0], rtol=0, atol=0, equal_nan=True)
    half.initial = {"att_kv": full["att_kv"][:, 0]}
    half.clear(0)
    torch.testing.assert_close(half["att_kv"], kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("other", [False, True])
def test_a_saved_state_goes_from_one_kind_to_the_other(
    architecture: Architecture, plugins: Plugins, tmp_path: Path, other: bool
) -> None:
    models = pair(architecture, plugins)
    saver, loader = models[::-1] if other else models
    state = saver.new_state()
    Eager().forward(saver)(torch.tensor([[1, 2, 3]]), state)
    state["att_kv"][0, 0, 0, 0, 0] = 65504.0 if other else 1e6
    save_snapshot(Snapshot(state, (4,), 3), tmp_path / "text.state")
    loaded = load_snapshot(tmp_path / "text.state", loader).state
    assert loaded["att_kv"].dtype == loader.state_dtype
    assert torch.equal(loaded["att_kv"].half(), state["att_kv"].clamp(-65504, 65504).half())


def test_a_damaged_state_is_refused_whichever_kind_reads_it(
    architecture: Architecture, plugins: Plugins, tmp_path: Path
) -> None:
    full, half = pair(architecture, plugins)
    state = full.new_state()
    state["att_kv"].fill_(torch.inf)
    save_snapshot(Snapshot(state, (4,), 3), tmp_path / "text.state")
    for model in (full, half):
        with pytest.raises(StateError, match="'att_kv' is damaged"):
            load_snapshot(tmp_path / "text.state", model)


@pytest.mark.parametrize("asked", ["auto", "native"])
def test_a_backend_that_can_is_taken(asked: str, plugins: Plugins) -> None:
    runtime = rwkv_runtime.load(backend=asked, state_dtype="fp16", device="cpu", plugins=plugins)
    assert runtime.backend.name not in ("native", "fused")
    assert runtime.backend.why_not(runtime.model) is None


def test_the_command_says_in_one_line_what_native_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, saved = save_tiny_model(tmp_path), str(tmp_path / "text.state")
    words = ["--state-dtype", "float16", "--backend", "native", "--device", "cpu", "-n", "2"]
    first = rwkv_run(model, "Once", *words, "--save-state", saved)
    assert first.exit_code == 0, first.stderr
    (said,) = [record.getMessage() for record in caplog.records]
    if Native().why_not(None) is None:
        assert "backend native: its states are float32 alone (leave out the state dtype); using" in said
    second = rwkv_run(model, "--load-state", saved, "--device", "cpu", "-n", "2")
    assert second.exit_code == 0, second.stderr


def test_native_leaves_it_to_others(architecture: Architecture, plugins: Plugins) -> None:
    full, half = pair(architecture, plugins)
    native = Native()
    if native.why_not(full) is None:
        assert native.why_not(half) == "its states are float32 alone (leave out the state dtype)"


@pytest.mark.parametrize("value", ["bfloat16", "float8", ""])
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

"""A text can be put down and taken up again: saved states are whole, checked, and another model's are refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Tensors, built, tiny_config, tokens_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwkv_runtime.errors import StateError
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.snapshot import Snapshot, load_snapshot, save_snapshot
from rwkv_runtime.state import State


@pytest.fixture
def snapshot(runtime: Runtime) -> Snapshot:
    """What is left after nine tokens of which the last is not read yet."""
    _, state = runtime.forward(tokens_of(8))
    return Snapshot(state, (65,), 8)


@pytest.fixture
def path(snapshot: Snapshot, tmp_path: Path) -> Path:
    save_snapshot(snapshot, tmp_path / "text.state")
    return tmp_path / "text.state"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def refusal(path: Path, model: Model) -> str:
    with pytest.raises(StateError) as caught:
        load_snapshot(path, model)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_what_was_saved_is_what_is_loaded(snapshot: Snapshot, path: Path, model: Model) -> None:
    again = load_snapshot(path, model)
    assert (again.pending, again.position) == (snapshot.pending, snapshot.position)
    assert again.state.tensors.keys() == snapshot.state.tensors.keys()
    assert all(torch.equal(t, snapshot.state[name]) for name, t in again.state.tensors.items())


@pytest.mark.usefixtures("lag")
def test_a_text_goes_on_from_a_file_as_if_it_had_never_stopped(runtime: Runtime, model: Model, tmp_path: Path) -> None:
    engine = runtime.engine("nucleus")

    def written(request: Request) -> Generation:
        generation = engine.submit(request)
        assert "".join(engine.stream(generation)) == generation.text
        return generation

    whole = written(Request(tokens_of(30), max_tokens=24, seed=5))
    half = written(Request(tokens_of(30), max_tokens=10, seed=5, keep=True))
    assert half.snapshot is not None
    save_snapshot(half.snapshot, tmp_path / "half.state")
    rest = written(Request(max_tokens=14, seed=5, start=load_snapshot(tmp_path / "half.state", model)))
    assert half.tokens + rest.tokens == whole.tokens
    assert len(whole.tokens) == 24


def test_one_row_of_a_batch_is_saved_alone(model: Model, tmp_path: Path) -> None:
    state = model.new_state(3)
    for row in range(3):
        for t in state.tensors.values():
            t[:, row] = row
    save_snapshot(Snapshot(state.view(1, 2), (1,), 4), tmp_path / "row.state")
    assert all(bool((t == 1).all()) for t in load_snapshot(tmp_path / "row.state", model).state.tensors.values())
    save_snapshot(Snapshot(state, (1,), 4), tmp_path / "all.state")
    assert "a state of 3 texts" in refusal(tmp_path / "all.state", model)


def test_a_state_goes_into_the_models_number_type(path: Path, checkpoint: Tensors, plugins: Plugins) -> None:
    state = load_snapshot(path, built(checkpoint, plugins, torch.bfloat16)).state
    assert (state["att_x_prev"].dtype, state["att_kv"].dtype) == (torch.bfloat16, torch.float32)


def test_saving_replaces_the_file_whole_or_leaves_it(
    snapshot: Snapshot, path: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_snapshot(replace(snapshot, position=9), path)
    assert load_snapshot(path, model).position == 9

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StateError, match="cannot be written: No space left"):
        save_snapshot(replace(snapshot, position=10), path)
    assert load_snapshot(path, model).position == 9
    assert [file.name for file in tmp_path.iterdir()] == ["text.state"]


def test_a_place_that_cannot_be_written(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be written"):
        save_snapshot(snapshot, tmp_path / "none" / "text.state")
    with pytest.raises(StateError, match="cannot be written"):
        save_snapshot(snapshot, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_states(path: Path, model: Model, checkpoint: Tensors, tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none", model)
    assert "a directory" in refusal(tmp_path, model)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Once upon a time")
    save_file(checkpoint, tmp_path / "weights")
    torch.save(dict(checkpoint), tmp_path / "weights.pth")
    for name in ("empty", "text", "weights", "weights.pth"):
        assert refusal(tmp_path / name, model).endswith("not a saved state; --save-state FILE makes one")
    (tmp_path / "half").write_bytes(path.read_bytes()[:-9])
    assert "truncated" in refusal(tmp_path / "half", model)
    save_file(load_file(path), tmp_path / "newer", metadata_of(path) | {"format": "rwkv-runtime state 2"})
    assert "saved by another version" in refusal(tmp_path / "newer", model)


def test_another_models_state(path: Path, architecture: Architecture, plugins: Plugins, tmp_path: Path) -> None:
    model = built(architecture.random(tiny_config(architecture, layers=3)), plugins)
    assert "a model of another size" in refusal(path, model)
    save_file(load_file(path), tmp_path / "other", metadata_of(path) | {"architecture": "rwkv9"})
    assert f"a model of rwkv9; this one is {architecture.name}" in refusal(tmp_path / "other", model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pending", "[260]"),
        ("pending", "[-1]"),
        ("pending", "[true]"),
        ("pending", "7"),
        ("pending", "[" * 100_000),
        ("position", "-1"),
        ("position", "1e9"),
        ("position", str(1 << 64)),
        ("position", "soon"),
    ],
)
def test_metadata_that_lies(name: str, value: str, path: Path, model: Model, tmp_path: Path) -> None:
    save_file(load_file(path), tmp_path / "bad", metadata_of(path) | {name: value})
    assert f"{name}" in refusal(tmp_path / "bad", model)


def test_missing_metadata(path: Path, model: Model, tmp_path: Path) -> None:
    for name in ("position", "pending"):
        kept = {key: value for key, value in metadata_of(path).items() if key != name}
        save_file(load_file(path), tmp_path / name, kept)
        assert "missing" in refusal(tmp_path / name, model)


def test_tensors_that_are_damaged(path: Path, model: Model, tmp_path: Path) -> None:
    good = load_file(path)
    bad = {
        "nan": good | {"att_kv": good["att_kv"] * torch.nan},
        "large": good | {"att_kv": good["att_kv"].double() + 1e300},
        "flat": good | {"att_kv": good["att_kv"].flatten()},
        "scalar": good | {"att_kv": torch.tensor(1.0)},
        "whole": good | {"att_kv": good["att_kv"].to(torch.int32)},
        "narrow": good | {"att_kv": good["att_kv"].to(torch.float8_e4m3fn)},
        "two": good | {"ffn_x_prev": good["ffn_x_prev"].repeat_interleave(2, dim=1)},
        "no rows": good | {"ffn_x_prev": good["ffn_x_prev"][:, :0]},
        "none": {name: t for name, t in good.items() if name != "att_kv"},
        "more": good | {"more": torch.ones(1)},
        "empty": {name: t[:, :0] for name, t in good.items()},
    }
    for name, tensors in bad.items():
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / name, metadata_of(path))
        assert refusal(tmp_path / name, model)


def test_any_damage_is_refused_or_leaves_a_finite_state(path: Path, model: Model) -> None:
    whole = path.read_bytes()
    draw = random.Random(4)
    outcomes = set()
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.choice((0, 1, 3))):
            data[draw.choice((draw.randrange(len(data)), draw.randrange(600)))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        try:
            state = load_snapshot(path, model).state
            outcomes.add(all(bool(t.isfinite().all()) for t in state.tensors.values()))
        except StateError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
    assert outcomes == {True, "refused"}


def test_states_of_two_architectures_do_not_mix(model: Model) -> None:
    other = State(model.new_state().tensors, architecture="rwkv9")
    with pytest.raises(StateError, match="rwkv9"):
        model.new_state().copy(other, 0, 0)
    with pytest.raises(StateError, match="rwkv9"):
        model.new_state().check(other.clone().view(0, 1))


def test_the_file_says_what_it_is(path: Path, architecture: Architecture) -> None:
    about = metadata_of(path)
    assert about["format"] == "rwkv-runtime state 1"
    assert about["architecture"] == architecture.name
    assert json.loads(about["pending"]) == [65]

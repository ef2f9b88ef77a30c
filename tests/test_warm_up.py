"""A backend that warms up while a model is loaded, and the blank model that it is given."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, Tensors
from rwkv_backends.eager import Eager

import rwkv_runtime
from rwkv_runtime import Architecture, Backend, CheckpointError, Model, Plugins, Tokenizer, driver, loading
from rwkv_runtime.blank import IDS, blank_model
from rwkv_runtime.checkpoint import build_model, open_tensors


@pytest.fixture
def saved(checkpoint: Tensors, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model's file, with its vocabulary beside it."""
    torch.save(checkpoint, tmp_path / "model.pth")
    tokenizer.to_file(tmp_path / "model.vocab.txt")
    return tmp_path / "model.pth"


def plugins_with(backend: Backend) -> Plugins:
    plugins = Plugins.load()
    plugins.backends.add(backend, "test")
    return plugins


class WarmsUp(Eager):
    name = "warm"
    priority = 99

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.calls: list[tuple[str, str, bool]] = []
        self.collecting: bool | None = None

    def warm_up(self, device: torch.device, blank: Callable[[], Model]) -> None:
        self.begun.set()
        architecture = blank().architecture
        assert blank().config.n_layer == 2
        self.collecting = gc.isenabled()
        beside = threading.current_thread() is not threading.main_thread()
        self.calls.append((architecture.name, device.type, beside))
        raise RuntimeError("it is told to who asks")


def test_the_backend_to_be_used_warms_up_while_a_model_is_loaded(
    saved: Path, architecture: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    backend = WarmsUp()
    plugins = plugins_with(backend)
    with caplog.at_level(logging.DEBUG, "rwkv_runtime"):
        loaded = rwkv_runtime.load(saved, device="cpu", plugins=plugins)
    assert backend.calls == [(architecture.name, "cpu", True)]
    assert loaded.backend is backend
    assert caplog.messages == ["backend warm cannot warm up: it is told to who asks"]
    assert (backend.collecting, gc.isenabled()) == (False, True)
    rwkv_runtime.load(saved, device="cpu", backend="eager", plugins=plugins)
    assert len(backend.calls) == 1


class Awaits(WarmsUp):
    """Has begun before a file is opened, and then is told whether there is a model."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.ended = threading.Event()

    def warm_up(self, device: torch.device, blank: Callable[[], Model]) -> None:
        self.begun.set()
        try:
            self.told.append(blank().architecture.name)
        except CancelledError:
            self.told.append("cancelled")
            raise
        finally:
            self.ended.set()


@pytest.mark.parametrize("room", [True, False])
def test_what_warms_up_begins_before_the_file_is_open(
    room: bool, saved: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Awaits()
    plugins = plugins_with(backend)

    def opened(path: Path) -> dict[str, torch.Tensor]:
        assert backend.begun.wait(20)
        assert backend.told == []
        return open_tensors(path)

    def built(*arguments: Any) -> Model:
        assert backend.ended.wait(20)  # before the model is made
        return build_model(*arguments)

    monkeypatch.setattr(loading, "open_tensors", opened)
    monkeypatch.setattr(loading, "build_model", built)
    monkeypatch.setattr(loading, "_room", lambda tensors, device: room)
    rwkv_runtime.load(saved, device="cpu", plugins=plugins)
    assert backend.told == [architecture.name if room else "cancelled"]


def test_a_file_that_is_no_checkpoint_keeps_nobody_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend, told = Awaits(), list[CheckpointError]()
    plugins = plugins_with(backend)
    (tmp_path / "model.pth").write_text("no checkpoint")

    def load() -> None:
        with pytest.raises(CheckpointError, match="not a checkpoint") as error:
            rwkv_runtime.load(tmp_path / "model.pth", device="cpu", plugins=plugins)
        told.append(error.value)

    thread = threading.Thread(target=load, daemon=True)
    with caplog.at_level(logging.DEBUG, "rwkv_runtime"):
        thread.start()
        thread.join(20)
    assert (len(told), backend.told, caplog.messages) == (1, ["cancelled"], [])


def test_a_wrong_name_waits_for_nothing_to_warm_up(tmp_path: Path) -> None:
    backend = Awaits()
    plugins = plugins_with(backend)
    with pytest.raises(CheckpointError, match="no such file"):
        rwkv_runtime.load(tmp_path / "model.pth", device="cpu", plugins=plugins)
    assert not backend.begun.is_set()


def test_only_a_backend_that_warms_up_waits_for_what_was_begun(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, waited = WarmsUp(), list[int]()
    plugins = plugins_with(backend)
    monkeypatch.setattr(driver, "wait", lambda: waited.append(len(backend.calls)))
    rwkv_runtime.load(saved, device="cpu", backend="eager", plugins=plugins)
    assert waited == []
    rwkv_runtime.load(saved, device="cpu", plugins=plugins)
    assert (waited, len(backend.calls)) == ([0], 1)


@pytest.mark.parametrize(("free", "room"), [(1249, False), (1250, False), (1251, True)])
def test_there_is_no_blank_model_where_a_gpu_has_hardly_room_for_the_weights(
    free: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10_000))
    tensors = {"a": torch.zeros(400, dtype=torch.uint8), "b": torch.zeros(600, dtype=torch.uint8)}
    assert loading._room(tensors, torch.device("cuda", 1)) is room
    assert loading._room(tensors, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_blank_model_is_like_the_real_one_but_small(architecture: Architecture, dtype: torch.dtype) -> None:
    tensors = architecture.random(architecture.sizes(4, 64, 5 * 64, 16))
    config = architecture.config({name: tuple(t.shape) for name, t in tensors.items()})
    blank = blank_model(tensors, architecture, config, CPU, dtype, torch.float32)
    assert (blank.config.n_layer, blank.config.n_embd, blank.dtype) == (2, 64, dtype)
    logits = Eager().forward(blank)(torch.zeros(1, 3, dtype=torch.int64), blank.new_state())
    assert logits.tolist() == [[0.0] * IDS]

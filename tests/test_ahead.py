"""Weights that threads bring to the device."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, Tensors, apart, built, logits_of, tokens_of
from safetensors.torch import save_file

import rwkv_runtime
from rwkv_runtime import Architecture, CheckpointError, Plugins, ahead
from rwkv_runtime.ahead import Ahead
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.mapped import Mapped, Reader

TOKENS = tokens_of(20)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def through_threads(tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all of a checkpoint come through the threads, as large tensors do on their way to a GPU."""
    monkeypatch.setattr(ahead, "LEAST", 1)
    monkeypatch.setattr("rwkv_runtime.checkpoint.Ahead", lambda _, device: Ahead(tensors, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_model_is_the_same_whoever_brings_its_weights(
    dtype: torch.dtype, checkpoint: Tensors, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 some are scaled on the way: those are not taken as they are."""
    expected = logits_of(built(checkpoint, plugins, dtype), TOKENS)
    through_threads(checkpoint, monkeypatch)
    assert torch.equal(logits_of(built(checkpoint, plugins, dtype), TOKENS), expected)


def test_a_number_that_is_not_finite_is_found(
    checkpoint: Tensors, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "blocks.1.ffn.key.weight"
    damaged = checkpoint | {name: checkpoint[name].clone().fill_(torch.nan)}
    through_threads(damaged, monkeypatch)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        built(damaged, plugins)


def test_each_is_handed_over_once_and_only_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST", 400)
    large, other, small = torch.rand(10, 10), torch.rand(10, 10), torch.rand(3)
    moved: list[torch.Tensor] = []
    copy = Ahead._copy

    def copied(self: Ahead, tensor: torch.Tensor) -> torch.Tensor:
        moved.append(copy(self, tensor).clone())
        return moved[-1]

    monkeypatch.setattr(Ahead, "_copy", copied)
    with Ahead({"large": large, "other": other, "small": small}, CPU) as weights:
        while len(moved) < 2:
            time.sleep(0.01)
        taken = weights.take("large", large.view(100))
        assert taken.data_ptr() in [tensor.data_ptr() for tensor in moved]
        assert torch.equal(taken, large.view(100))
        assert weights.take("large", large) is large
        double = other * 2
        assert weights.take("other", double) is double
        assert weights.take("other", other) is other
        assert weights.take("small", small) is small
        assert len(moved) == 2


def test_nobody_waits_for_a_copy_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait(self: Ahead, tensor: torch.Tensor) -> torch.Tensor:
        begun.release()
        go_on.wait()
        return tensor.clone()

    monkeypatch.setattr(Ahead, "_copy", wait)
    tensors = {str(i): torch.full((1 << 18,), float(i)) for i in range(9)}
    with Ahead(tensors, CPU) as weights:
        for _ in range(ahead.THREADS):
            begun.acquire()
        assert weights.take("8", tensors["8"]) is tensors["8"]
        go_on.set()
        assert weights.take("0", tensors["0"]) is not tensors["0"]


def test_what_fails_stops_the_threads() -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Ahead({"a": torch.zeros(1 << 20)}, CPU):
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_numbers_in_another_order_are_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LEAST", 1)
    own = torch.rand(20, 30)
    copied = threading.Event()
    copy = Ahead._copy
    monkeypatch.setattr(Ahead, "_copy", lambda self, tensor: (copy(self, tensor), copied.set())[0])
    with Ahead({"own": own}, CPU) as weights:
        copied.wait()
        assert torch.equal(weights.take("own", own.t()), own.t())


@pytest.mark.parametrize("numbers", [0, 1, 1023, 1024, 10_001])
def test_large_ones_come_in_pieces_of_which_few_are_under_way(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but that memory is pinned by being copied, and nothing ends before it is waited for."""
    pinned, under_way, most = list[int](), 0, 0

    class Event:
        def synchronize(self) -> None:
            nonlocal under_way
            under_way -= 1

    class Stream:
        def record_event(self) -> Event:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            return Event()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(ahead, "PIECE", 4096)
    monkeypatch.setattr(ahead, "PIECES", 3)
    monkeypatch.setattr(ahead, "LEAST", 1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    own = [torch.rand(numbers) for _ in range(5)]
    weights = Ahead({str(i): tensor for i, tensor in enumerate(own)}, CPU)
    monkeypatch.setattr(weights, "_stream", Stream())
    assert all(torch.equal(weights.take(str(i), tensor), tensor) for i, tensor in enumerate(own))
    assert sum(pinned) == 5 * own[0].nbytes
    assert max(pinned, default=0) <= 4096
    assert most == min(4, len(pinned) if numbers else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped, and where")
def test_a_file_is_read_and_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    own = {"large": torch.rand(1 << 19), "small": torch.rand(9)}
    torch.save(own, tmp_path / "model.pth")
    tensors = Mapped(open_tensors(tmp_path / "model.pth"), tmp_path / "model.pth")
    event = SimpleNamespace(synchronize=lambda: None)
    like = torch.empty_like
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device=None, pin_memory=False: like(tensor))
    weights = Ahead(tensors, CPU)
    stream = SimpleNamespace(record_event=lambda: event, synchronize=lambda: None)
    monkeypatch.setattr(weights, "_stream", stream)
    before = files()
    with weights:
        assert files() == before + 1
        assert all(torch.equal(weights.take(name, tensor), own[name]) for name, tensor in tensors.items())
    assert files() == before


def test_what_is_done_with_goes_at_once() -> None:
    """And not with the next search for garbage, of which a process that loads a model may have none."""
    tensors = {"large": torch.zeros(1 << 20)}
    gone = weakref.ref(tensors["large"])
    gc.disable()
    try:
        with Ahead(tensors, CPU) as weights:
            weights.take("large", tensors["large"])
        del weights, tensors
        assert gone() is None
    finally:
        gc.enable()


@needs_cuda
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_on_a_gpu_a_file_is_read_and_not_touched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PIECE", 1 << 18)
    own = {"large": torch.arange(1 << 22, dtype=torch.float32), "small": torch.arange(9.0), "empty": torch.zeros(0)}
    if name.endswith("pth"):
        torch.save(own, tmp_path / name)
    else:
        save_file(own, tmp_path / name)
    tensors = Mapped(open_tensors(tmp_path / name), tmp_path / name)
    read, whole = list[int](), Reader.read

    def reading(self: Reader, tensor: torch.Tensor, to: torch.Tensor) -> None:
        read.append(tensor.nbytes)
        whole(self, tensor, to)

    monkeypatch.setattr(Reader, "read", reading)
    with Ahead(tensors, torch.device("cuda")) as weights:
        taken = {name: weights.take(name, tensor) for name, tensor in tensors.items()}
    assert all(torch.equal(taken[name].cpu(), own[name]) for name in own)
    assert sum(read) == sum(tensor.nbytes for tensor in own.values())


@needs_cuda
def test_on_a_gpu_a_file_that_becomes_shorter_is_told(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    torch.save(architecture.random(architecture.sizes(2, 1024, 65536)), path)
    begin = Ahead.__enter__

    def shortened(self: Ahead) -> Ahead:
        os.truncate(path, 1 << 20)
        return begin(self)

    monkeypatch.setattr(Ahead, "__enter__", shortened)
    with pytest.raises(CheckpointError, match=r"model\.pth: it has become shorter while it was read"):
        rwkv_runtime.load(path, device="cuda", backend="eager")


@needs_cuda
def test_on_a_gpu_a_file_that_is_gone_is_still_there_as_memory(tmp_path: Path) -> None:
    numbers = torch.arange(1 << 20, dtype=torch.float32)
    torch.save({"numbers": numbers}, tmp_path / "numbers.pth")
    tensors = Mapped(open_tensors(tmp_path / "numbers.pth"), tmp_path / "numbers.pth")
    (tmp_path / "numbers.pth").unlink()
    with Ahead(tensors, torch.device("cuda")) as weights:
        assert torch.equal(weights.take("numbers", tensors["numbers"]).cpu(), numbers)


@needs_cuda
def test_on_a_gpu_they_come_in_the_order_of_the_caller_s_stream() -> None:
    tensors = {str(i): torch.full((1 << 20,), float(i)) for i in range(40)}
    with torch.cuda.stream(torch.cuda.Stream()), Ahead(tensors, torch.device("cuda")) as weights:
        right = [(weights.take(name, tensor) == int(name)).all() for name, tensor in tensors.items()]  # freed at once
        assert all(right)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_they_come_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece is shorter; what does not lie as it is read comes whole."""
    monkeypatch.setattr(ahead, "PIECE", 1 << 18)
    lying = torch.randn(1000, 777).to(dtype)
    tensors = {"lying": lying, "turned": lying.t(), "every other": torch.randn(1 << 20).to(dtype)[::2]}
    with Ahead(tensors, torch.device("cuda")) as weights:
        taken = {name: weights.take(name, tensor) for name, tensor in tensors.items()}
    assert all(taken[name].is_cuda and torch.equal(taken[name].cpu(), tensors[name]) for name in tensors)


@needs_cuda
def test_a_large_model_on_a_gpu_is_that_of_the_cpu(architecture: Architecture, tmp_path: Path) -> None:
    torch.save(architecture.random(architecture.sizes(2, 1024, 65536)), tmp_path / "model.pth")
    ours, theirs = (rwkv_runtime.load(tmp_path / "model.pth", device=d, backend="eager") for d in ("cuda", "cpu"))
    assert apart(ours.logits(TOKENS).cpu(), theirs.logits(TOKENS)) < 1e-3

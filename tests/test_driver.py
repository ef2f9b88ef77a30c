"""A GPU's driver begins while torch is imported."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv_runtime import driver


class Library:
    """A driver that notes what is asked of it, and refuses one thing."""

    def __init__(self, refused: str = "") -> None:
        self.asked: list[tuple[str, int]] = []
        self.refused = refused

    def __getattr__(self, name: str) -> Callable[..., int]:
        def asked(*arguments: Any) -> int:
            last = arguments[-1]
            self.asked.append((name, last.value if isinstance(last, ctypes.c_int) else last))
            return int(name == self.refused)

        return asked


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(driver, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    return library


class Triton:
    """What of Triton is asked, as modules that are imported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
        self.library, self.hashed = library, list[tuple[int, float]]()
        cache = SimpleNamespace(triton_key=self.key)
        modules = {"triton": SimpleNamespace(), "triton.runtime": SimpleNamespace(cache=cache)}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(driver, "find_spec", modules.get)

    def key(self) -> str:
        """Notes how much of the driver there was, and how long threads have in turn."""
        self.hashed.append((len(self.library.asked), round(sys.getswitchinterval(), 6)))
        return "hash"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, library: Library) -> Triton:
    return Triton(monkeypatch, library)


def test_triton_hashes_itself_when_there_is_a_context(triton: Triton) -> None:
    """In short turns, for as long as it does so."""
    before = sys.getswitchinterval()
    thread = driver.begin()
    assert thread is not None
    thread.join()
    assert triton.hashed == [(3, driver.TURN)]
    assert sys.getswitchinterval() == before


def test_triton_is_left_alone_where_there_is_no_gpu(triton: Triton) -> None:
    triton.library.refused = "cuInit"
    thread = driver.begin()
    assert thread is not None
    thread.join()
    assert triton.hashed == []


def test_a_triton_that_is_broken_is_not_told_here(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that needs it says so; a thread's exception would be shown, and turns would stay short."""
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    before, shown = sys.getswitchinterval(), list[object]()
    monkeypatch.setattr(threading, "excepthook", shown.append)
    thread = driver.begin()
    assert thread is not None
    thread.join()
    assert (shown, sys.getswitchinterval()) == ([], before)


def test_who_needs_it_waits_for_the_thread_that_is_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(driver, "_begin", lambda index: go_on.wait())
    thread = driver.Beginning(driver._begin, 0)
    thread.start()
    needs = threading.Thread(target=driver.wait)
    needs.start()
    needs.join(0.05)
    assert needs.is_alive()
    go_on.set()
    needs.join()
    assert not thread.is_alive()


@pytest.mark.parametrize(("device", "index"), [(None, 0), ("cuda", 0), ("cuda:3", 3)])
def test_it_makes_the_context_of_the_device_that_is_named(library: Library, device: str | None, index: int) -> None:
    thread = driver.begin(device)
    assert thread is not None
    thread.join()
    assert [name for name, _ in library.asked] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert library.asked[:2] == [("cuInit", 0), ("cuDeviceGet", index)]


@pytest.mark.parametrize("device", ["cpu", "cuda:", "cuda:x", "mps", "a word", ""])
def test_it_does_nothing_for_what_is_no_gpu(library: Library, device: str) -> None:
    assert driver.begin(device) is None
    assert library.asked == []


def test_it_does_nothing_where_torch_has_no_cuda(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_torch_has_cuda", lambda: False)
    assert driver.begin() is None
    assert library.asked == []


def test_whether_torch_has_cuda_is_what_torch_says() -> None:
    assert driver._torch_has_cuda() == torch.backends.cuda.is_built()


@pytest.mark.parametrize("refused", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_what_the_driver_refuses_ends_it(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    library = Library(refused)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not driver._make_context(0)
    assert library.asked[-1][0] == refused


def test_a_machine_without_a_driver_is_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnosuchdriver.so.1")
    assert not driver._make_context(0)


def test_it_needs_no_torch() -> None:
    code = "import sys; from rwkv_runtime import driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_ends_without_waiting_for_it() -> None:
    code = (
        "import time; from rwkv_runtime import driver;"
        "driver._begin = lambda index: time.sleep(60); driver.Beginning(driver._begin, 0).start();"
        "print('said', end=''); driver.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_torch_works_in_the_context_that_it_made() -> None:
    code = (
        "import ctypes; from rwkv_runtime import driver; driver.begin().join();"
        "flags, active = ctypes.c_uint(), ctypes.c_int();"
        "get = ctypes.CDLL(driver.LIBRARY).cuDevicePrimaryCtxGetState;"
        "assert get(0, ctypes.byref(flags), ctypes.byref(active)) == 0;"
        "import torch; print(active.value, int(torch.arange(5, device='cuda').sum()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_MODULE_LOADING"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "10"]

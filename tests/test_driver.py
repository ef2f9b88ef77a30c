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

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.refused = ""
        self.threads: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        self.threads.append(threading.current_thread().name)

        def asked(*arguments: Any) -> int:
            last = arguments[-1]
            self.asked.append((name, last.value if isinstance(last, ctypes.c_int) else last))
            return int(name == self.refused)

        return asked


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(driver, "_torch_has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    return library


class Triton:
    """What of Triton is asked, as modules that are imported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed, self.error = list[float](), False
        cache = SimpleNamespace(triton_key=self.key)
        modules = {"triton": SimpleNamespace(), "triton.runtime": SimpleNamespace(), "triton.runtime.cache": cache}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    def key(self) -> str:
        """Notes how long threads have in turn."""
        self.hashed.append(round(sys.getswitchinterval(), 6))
        if self.error:
            raise OSError("it is broken")
        return "hash"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch, library: Library) -> Triton:
    return Triton(monkeypatch)


@pytest.mark.parametrize("error", [False, True])
def test_triton_hashes_itself_in_short_turns(triton: Triton, error: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it does so. What fails is told by a backend that needs it; a thread's exception would be shown."""
    triton.error = error
    before, shown = sys.getswitchinterval(), list[object]()
    monkeypatch.setattr(threading, "excepthook", shown.append)
    driver.begin()
    driver.wait()
    assert (triton.hashed, shown) == ([driver.TURN], [])
    assert sys.getswitchinterval() == before


class Broken:
    def __getattr__(self, name: str) -> object:
        raise OSError("it is broken")


@pytest.mark.parametrize("module", [None, SimpleNamespace(), Broken()], ids=["absent", "other", "broken"])
def test_one_that_cannot_is_not_told_here(
    module: object, triton: Triton, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because it is not there, is another version or is broken; the driver begins all the same."""
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", module)
    driver.begin()
    driver.wait()
    assert (triton.hashed, len(library.asked)) == ([], 3)


@pytest.mark.parametrize("fails", [OSError("no such file"), AttributeError("no such symbol")])
def test_where_there_is_no_driver_nothing_begins(
    fails: Exception, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a GPU, or where it is none that torch could use."""

    def cdll(name: str) -> Library:
        raise fails

    monkeypatch.setattr(ctypes, "CDLL", cdll)
    driver.begin()
    driver.wait()
    assert triton.hashed == []


def test_who_needs_it_waits_for_the_thread_that_is_at_it() -> None:
    go_on = threading.Event()
    thread = driver.Beginning(go_on.wait)
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
    driver.begin(device)
    driver.wait()
    assert [name for name, _ in library.asked] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert library.asked[:2] == [("cuInit", 0), ("cuDeviceGet", index)]


def test_its_functions_are_looked_up_before_any_thread_begins(library: Library) -> None:
    """Later, that may wait for libraries, and the interpreter with it."""
    driver.begin()
    driver.wait()
    assert library.threads == [threading.main_thread().name] * 3


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_nothing_begins_where_no_gpu_is_to_be_seen(
    hidden: str, library: Library, triton: Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    driver.begin()
    driver.wait()
    assert (library.threads, triton.hashed) == ([], [])


@pytest.mark.parametrize("device", ["cpu", "cuda:", "cuda:x", "mps", "a word", ""])
def test_it_does_nothing_for_what_is_no_gpu(library: Library, device: str) -> None:
    driver.begin(device)
    driver.wait()
    assert library.asked == []


def test_it_does_nothing_where_torch_has_no_cuda(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_torch_has_cuda", lambda: False)
    driver.begin()
    driver.wait()
    assert library.asked == []


def test_whether_torch_has_cuda_is_what_torch_says() -> None:
    assert driver._torch_has_cuda() == torch.backends.cuda.is_built()


@pytest.mark.parametrize("refused", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_what_the_driver_refuses_ends_it(library: Library, refused: str) -> None:
    library.refused = refused
    driver.begin()
    driver.wait()
    assert library.asked[-1][0] == refused


def test_it_needs_no_torch() -> None:
    code = "import sys; from rwkv_runtime import driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_ends_without_waiting_for_it() -> None:
    code = (
        "import time; from rwkv_runtime import driver;"
        "driver.Beginning(lambda: time.sleep(60)).start();"
        "print('said', end=''); driver.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_torch_works_in_the_context_that_it_made() -> None:
    code = (
        "import ctypes; from rwkv_runtime import driver; driver.begin(); driver.wait();"
        "flags, active = ctypes.c_uint(), ctypes.c_int();"
        "get = ctypes.CDLL(driver.LIBRARY).cuDevicePrimaryCtxGetState;"
        "assert get(0, ctypes.byref(flags), ctypes.byref(active)) == 0;"
        "import torch; print(active.value, int(torch.arange(5, device='cuda').sum()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_MODULE_LOADING"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "10"]

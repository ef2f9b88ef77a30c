"""A GPU's driver begins while torch is imported."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rwkv_runtime import driver
from rwkv_runtime.cli import command


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
    return library


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
        "import threading, time; from rwkv_runtime import driver;"
        "threading.Thread(target=time.sleep, args=(60,), name=driver.NAME, daemon=True).start();"
        "print('said', end=''); driver.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


def test_rwkv_run_begins_it_for_a_text_and_not_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str | None] = []
    monkeypatch.setattr(driver, "begin", begun.append)
    CliRunner().invoke(command, ["--backends"])
    assert begun == []
    assert CliRunner().invoke(command, ["Once", "--device", "cpu", "-n", "1", "-q"]).exit_code == 0
    assert begun == ["cpu"]


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

"""What begins in threads while Python imports torch: a GPU's driver, which is needed only afterwards."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
TURN = 0.0002
"""Seconds that Python's threads have in turn while that one hashes: it asks 800 times, each time waiting for a turn to
end, which is 0.005 s otherwise."""


class Beginning(threading.Thread):
    """It is known by its class wherever it is asked for."""

    def __init__(self, work: Callable[..., None], *arguments: int) -> None:
        super().__init__(target=work, args=arguments, daemon=True)


def begin(device: str | None = None) -> Beginning | None:
    """Has the driver make the context that torch will use on `device` ("cuda", "cuda:N"; None is "cuda"). Then Triton
    hashes itself, 400 MB, as it would before it loads its first kernel, and keeps that.

    The thread that does so, or None where the device is another or torch is one without CUDA. What fails there fails in
    torch, too, and is told by it: a machine without the driver is one without a GPU.
    """
    chosen = re.fullmatch(r"cuda(?::(\d{1,4}))?", "cuda" if device is None else device)
    if not chosen or not _torch_has_cuda():
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # torch's own choice, which the driver reads as it begins
    thread = Beginning(_begin, int(chosen[1] or 0))
    thread.start()
    return thread


def wait() -> None:
    """Until what was begun is done."""
    for thread in threading.enumerate():
        if isinstance(thread, Beginning):
            thread.join()


def leave(status: int) -> NoReturn:
    """Ends the process, without waiting for what is still beginning: a driver of many GPUs takes seconds."""
    if any(isinstance(thread, Beginning) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)  # its libraries may not be taken down meanwhile
    sys.exit(status)


def _torch_has_cuda() -> bool:
    """Without importing it."""
    torch = find_spec("torch")
    return bool(torch and torch.origin and any((Path(torch.origin).parent / "lib").glob("*torch_cuda.*")))


def _begin(index: int) -> None:
    if not _make_context(index) or find_spec("triton") is None:
        return
    turn = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        from triton.runtime import cache

        cache.triton_key()
    except Exception as error:  # a broken one, of which a backend will tell that needs it, or another version
        logging.getLogger("rwkv_runtime").debug(f"Triton cannot begin: {error}")
    finally:
        sys.setswitchinterval(turn)


def _make_context(index: int) -> bool:
    """Whether it did. The primary context of a device is one for all libraries, and stays until the process ends."""
    try:
        driver = ctypes.CDLL(LIBRARY)  # its calls do not hold the interpreter
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return bool(
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )

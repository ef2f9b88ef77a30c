"""What begins in threads while Python imports torch: a GPU's driver, and Triton, which are needed only afterwards."""

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
"""Seconds that Python's threads have in turn while Triton hashes itself: its thread asks 800 times, each time waiting
for a turn to end, which is 0.005 s otherwise."""
Call = Callable[..., int]
"""Of the driver; 0 is success."""


class Beginning(threading.Thread):
    """It is known by its class wherever it is asked for."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        super().__init__(target=work, args=arguments, daemon=True)


def begin(device: str | None = None) -> None:
    """Has the driver make the context that torch will use on `device` ("cuda", "cuda:N"; None is "cuda"), in a thread.

    In another, Triton hashes itself, 400 MB, which it would do before it loads its first kernel. Nothing begins where
    the device is another, torch is one without CUDA, there is no driver, or no GPU is to be seen. What fails there
    fails in torch, too, and is told by it.
    """
    chosen = re.fullmatch(r"cuda(?::(\d{1,4}))?", "cuda" if device is None else device)
    if not chosen or not _torch_has_cuda() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # torch's own choice, which the driver reads as it begins
    # Loaded, and looked up, here: while a thread loads other libraries either would wait, and hold the interpreter.
    try:
        library = ctypes.CDLL(LIBRARY)
        calls = library.cuInit, library.cuDeviceGet, library.cuDevicePrimaryCtxRetain
    except (OSError, AttributeError):
        return
    Beginning(_make_context, *calls, int(chosen[1] or 0)).start()
    try:
        from triton.runtime.cache import triton_key
    except Exception as error:  # none, or another version, or a broken one, of which a backend tells that needs it
        _cannot_begin(error)
    else:
        Beginning(_in_short_turns, triton_key).start()


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


def _make_context(init: Call, get: Call, retain: Call, index: int) -> None:
    """The primary context of a device is one for all libraries, and stays until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()  # these calls do not hold the interpreter
    if init(0) == 0 and get(ctypes.byref(device), index) == 0:
        retain(ctypes.byref(context), device)


def _in_short_turns(triton_key: Callable[[], str]) -> None:
    turn = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        triton_key()
    except Exception as error:  # a thread's would be shown
        _cannot_begin(error)
    finally:
        sys.setswitchinterval(turn)


def _cannot_begin(error: Exception) -> None:
    logging.getLogger("rwkv_runtime").debug(f"Triton cannot begin: {error}")

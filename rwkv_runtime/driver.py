"""A GPU's driver begins in a thread while Python imports torch, which takes longer and needs it only afterwards."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from threading import Thread

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def begin(device: str | None = None) -> Thread | None:
    """Has the driver make the context that torch will use on `device` ("cuda", "cuda:N"; None is "cuda").

    The thread that does so, or None where the device is another. What fails there fails in torch, too, and is told by
    it: a machine without the driver is one without a GPU.
    """
    if not (chosen := re.fullmatch(r"cuda(?::(\d{1,4}))?", device or "cuda")):
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # torch's own choice, which the driver reads as it begins
    thread = Thread(target=_make_context, args=(int(chosen[1] or 0),), name="driver")
    thread.start()
    return thread


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

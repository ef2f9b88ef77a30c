"""What a `load` needs, and what needs no torch, begins before Python imports that."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rwkv_runtime import driver
from rwkv_runtime.errors import VocabularyError

LIBRARIES = ("libtorch_global_deps.so", "libtorch.so")
"""torch's own, in its order, with all that they depend on; what the first has, all may use."""
WITH_LIBRARIES = ("asyncio", "binascii", "csv", "datetime", "hashlib", "inspect", "unicodedata")
"""Of what is imported next, all that has a library of its own, or is one: such wait while others are mapped."""
MODULES = ("torchgen.model", "unittest.mock", "importlib.metadata", "pluggy", "pynvml", "tqdm", "urllib.request")
"""That torch or `load` imports, where they are installed, and that need nothing of torch."""
OF_TRITON = ("triton.experimental.gluon",)
"""What Triton imports before its first kernel."""


def begin(model: str | os.PathLike[str] | None, vocab: str | os.PathLike[str] | None, device: str | None) -> None:
    """For a `load` with these arguments, in which what fails here fails, too, and is told.

    A GPU's driver begins in a thread. In another torch's libraries are mapped; meanwhile the vocabulary is read, and
    modules are imported that torch will need. A process that has begun ends by `driver.leave`, or after `driver.wait`.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # or numpy has each core spin for 0.1 s as it is loaded
    driver.begin(device)
    from rwkv_runtime.tokenizer import load_tokenizer
    from rwkv_runtime.vocabulary import expected_vocabulary

    _import(WITH_LIBRARIES)
    driver.Beginning(map_libraries).start()
    if model is not None:  # the embedded model's is small
        with suppress(VocabularyError, OSError, ValueError):
            load_tokenizer(expected_vocabulary(model, vocab))
    _import((*MODULES, *(OF_TRITON if "triton" in sys.modules else ())))


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with suppress(Exception):  # who needs it imports it again, and tells what is wrong
            import_module(name)


def map_libraries() -> None:
    """As an import of torch does, but that the interpreter is not held: 0.15 s, 0.3 to 0.4 with CUDA.

    Where this fails, or elsewhere than on Linux, torch finds them by itself.
    """
    torch = find_spec("torch")
    if sys.platform == "linux" and torch and torch.origin:
        load = ctypes.CDLL(None).dlopen
        load.restype = ctypes.c_void_p
        for name, scope in zip(LIBRARIES, (os.RTLD_GLOBAL, os.RTLD_LOCAL), strict=True):
            load(os.fsencode(Path(torch.origin).parent / "lib" / name), os.RTLD_NOW | scope)

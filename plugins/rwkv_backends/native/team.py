"""The threads that torch itself uses, found in the OpenMP library that torch has loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
"""GNU's library has them, and those of LLVM and Intel have them too."""


class Team(ctypes.Structure):
    """`struct team` of team.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in FUNCTIONS]


def find_team() -> Team | None:
    """None where torch has no OpenMP library in this process."""
    for path in _loaded():
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in FUNCTIONS):
            return Team(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS))
    return None


def _loaded() -> Iterator[str]:
    """OpenMP libraries mapped into this process, torch's own before others."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        paths = {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) > 5}
    found = [path for path in paths if path.rpartition("/")[2].startswith(("libgomp", "libomp", "libiomp"))]
    yield from sorted(found, key=lambda path: ("/torch/" not in path, path))

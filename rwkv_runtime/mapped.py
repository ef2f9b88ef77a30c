"""Tensors that lie in a file, of which the system reads what is touched."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cached_property

from torch import Tensor

MAPS = "/proc/self/maps"
"""Where Linux says what lies where in a process's memory."""


class Mapped(dict[str, Tensor]):
    """The tensors of a file, by name. Who wraps them so does not write to them: what was written could be lost."""

    def __init__(self, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
        super().__init__(tensors)
        self._path = os.path.realpath(path)

    @cached_property
    def _places(self) -> list[range]:
        return places(self._path)

    def give_back(self, tensor: Tensor) -> None:
        """Takes a contiguous tensor's pages out of the process: touched again, they are read from the file again.

        All at once, when Python frees the tensors, it takes 0.03 s a gigabyte and holds the interpreter; this does not.
        Memory that is not known to be the file's is left as it is.
        """
        size, page = tensor.nbytes, mmap.PAGESIZE
        if size and any(tensor.data_ptr() in p and tensor.data_ptr() + size - 1 in p for p in self._places):
            begin = -(-tensor.data_ptr() // page) * page  # a page that others have a part of stays
            length = max(0, (tensor.data_ptr() + size) // page * page - begin)
            self._advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    @cached_property
    def _advise(self) -> Callable[..., int]:
        """The system's `madvise`."""
        return ctypes.CDLL(None).madvise


def places(path: str | os.PathLike[str]) -> list[range]:
    """Addresses at which a file is mapped; none where the system does not say."""
    name = os.path.realpath(path)
    try:
        with open(MAPS, encoding="utf-8", errors="surrogateescape") as lines:
            ours = [line.split(maxsplit=5) for line in lines if name in line]
    except OSError:
        return []
    ends = [fields[0].split("-") for fields in ours if fields[5].rstrip("\n") == name]
    return [range(int(begin, 16), int(end, 16)) for begin, end in ends]

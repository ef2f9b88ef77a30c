"""Tensors that lie in a file, of which the system reads what is touched, and a way to read them without."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

from torch import Tensor

from rwkv_runtime.errors import CheckpointError

MAPS = "/proc/self/maps"
"""Where Linux says what lies where in a process's memory."""


class Mapped(dict[str, Tensor]):
    """The tensors of a file, by name. Who wraps them so does not write to them: what was written may be passed over."""

    def __init__(self, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
        super().__init__(tensors)
        self.path = path


class Place(NamedTuple):
    """A part of a file in memory."""

    addresses: range
    offset: int  # in the file, of the first

    def of(self, tensor: Tensor) -> int | None:
        """Where in the file a contiguous tensor begins; None for one that does not lie in this part."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = self.addresses.start <= begin and end <= self.addresses.stop
        return self.offset + begin - self.addresses.start if inside else None


class Reader:
    """Copies tensors from a file that they are mapped from.

    The system notes in a table where each page is that a process touches, which takes longer than to copy it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError where the file cannot be opened."""
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (`close` closes it)
        self._places = places(path)  # asked for afterwards: what another file has taken the place of is no longer there

    def read(self, tensor: Tensor, to: Tensor) -> None:
        """Copies a contiguous tensor to memory of its size; one that does not lie in the file, from where it lies.

        Raises CheckpointError where the file cannot be read.
        """
        offset = next((at for place in self._places if (at := place.of(tensor)) is not None), None)
        if offset is None or tensor.is_neg():  # a view that is to be read with other signs
            to.copy_(tensor)
        else:
            _read(self._file.fileno(), offset, to)

    def close(self) -> None:
        self._file.close()


def _read(file: int, offset: int, to: Tensor) -> None:
    if sys.platform == "win32":
        raise NotImplementedError  # nothing is known to be mapped there
    memory = memoryview((ctypes.c_char * to.nbytes).from_address(to.data_ptr()))
    while memory:
        try:
            count = os.preadv(file, [memory], offset)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}") from None
        if not count:
            raise CheckpointError("it has become shorter while it was read")
        memory, offset = memory[count:], offset + count


def places(path: str | os.PathLike[str]) -> list[Place]:
    """Where a file is mapped; nowhere where the system does not say."""
    name = os.path.realpath(path)
    try:
        with open(MAPS, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            ours = [line.split(maxsplit=5) for line in lines if name in line]
    except OSError:
        return []
    found = [(*fields[0].split("-"), fields[2]) for fields in ours if fields[5:] == [f"{name}\n"]]
    return [Place(range(int(begin, 16), int(end, 16)), int(offset, 16)) for begin, end, offset in found]

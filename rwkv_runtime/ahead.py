"""Weights on their way to a GPU while Python does something else."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import torch
from torch import Tensor

from rwkv_runtime.mapped import Mapped, Reader

THREADS = 4
"""What a copy takes is mostly the host's: to read the file to where the device reads by itself."""
LEAST = 1 << 20
"""Bytes from which on a tensor is worth a thread."""
PIECE = 8 << 20
"""Bytes that are read at once, and copied to the device while the next are."""
PIECES = 8
"""That may be under way, beside one of each thread, so that a slow link does not have the whole file pinned."""


class Ahead:
    """Copies large tensors to a device in threads, in their order, from `with` on; each is to be taken once.

    What takes long of a copy does not hold the interpreter. Of a file, the process has in memory what is under way.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self._copies: dict[str, Future[Tensor]] = {}
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(THREADS, "weights", _use_stream, (self._stream,))
        self._under_way: deque[torch.cuda.Event] = deque()
        self._reader: Reader | None = None

    def __enter__(self) -> Ahead:
        if self._stream is not None and isinstance(self.tensors, Mapped):
            with suppress(OSError):  # it is mapped, all the same
                self._reader = Reader(self.tensors.path)
        for name, tensor in self.tensors.items():
            if tensor.nbytes >= LEAST:
                self._copies[name] = self._pool.submit(self._copy, tensor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._copies.clear()
        if self._reader is not None:
            self._reader.close()
        if self._stream is not None:
            self._stream.synchronize()  # the copies may be used in any stream from here on

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that name on the device. Where no copy has begun, or `tensor` is another, a product of it, say,
        that is brought to a GPU without waiting for those ahead of it, and elsewhere left as it is."""
        copy, own = self._copies.pop(name, None), self.tensors.get(name)
        if copy is not None and not copy.cancel() and own is not None and _same(own, tensor):
            return copy.result().view(tensor.shape)
        return tensor if own is None or self._stream is None else self._copy(tensor)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not (self._stream and tensor.is_contiguous()):
            return tensor.to(self.device)
        copy = torch.empty_like(tensor, device=self.device)
        if tensor.nbytes < LEAST:
            return copy.copy_(self._pinned(tensor), non_blocking=True)
        here, there, numbers = tensor.view(-1), copy.view(-1), PIECE // tensor.element_size()
        for i in range(0, len(here), numbers):
            there[i : i + numbers].copy_(self._pinned(here[i : i + numbers]), non_blocking=True)
            self._under_way.append(self._stream.record_event())
            if len(self._under_way) > PIECES:
                self._under_way.popleft().synchronize()  # its memory is then used again
        return copy

    def _pinned(self, tensor: Tensor) -> Tensor:
        """A copy where the device reads by itself."""
        if self._reader is None:
            return tensor.pin_memory()
        pinned = torch.empty_like(tensor, pin_memory=True)
        self._reader.read(tensor, pinned)
        return pinned


def _use_stream(stream: torch.cuda.Stream | None) -> None:
    """In each thread: the caller's, for memory is reused in the order of the stream that it is used on."""
    if stream is not None:
        torch.cuda.set_stream(stream)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same numbers in the same order, of whatever shapes."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() and b.is_contiguous()

"""Small products on a second stream, beside a large one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


class Beside:
    """A second stream beside the current one, for one step; without one all is done in turn.

    `fork` marks what the work beside may rely on, `join` makes what follows wait for it: a captured graph has both
    streams in it. Between the two the caller keeps the tensors that it reads and writes, which are of the first
    stream's memory, so that nothing of it is used again too early.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def fork(self) -> None:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def work(self) -> AbstractContextManager[object]:
        """What is started inside runs beside what the other stream was given since the last `fork`."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def join(self) -> None:
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)

"""Products that run beside others: the multiprocessors that one leaves idle at its end are the other's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """A second stream of a GPU; anywhere else, what is started within is done where it stands.

    What is allocated within `started` belongs to the second stream. It may be let go of once all that reads it has
    been started after `done`: the next `started` waits for that.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        used = on and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if used else None  # type: ignore[no-untyped-call]

    @contextmanager
    def started(self) -> Iterator[None]:
        """After all that has been started so far, and beside what is started next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def done(self) -> None:
        """What is started next waits for it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

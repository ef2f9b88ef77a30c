"""What is under way on the device: drawn tokens on their way to the host, and a prompt's chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_runtime.generation import Generation


class Flight:
    """What carries the tokens of a step, int64 [B], to the host, again and again; the device goes on meanwhile.

    Its memory (pinned, for a GPU) and its event are made once: to make them anew takes longer than a small step.
    """

    def __init__(self, drawn: Tensor) -> None:
        self.generations: tuple[Generation, ...] = ()
        self._drawn = drawn
        self._tokens = torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=drawn.is_cuda)
        self._arrived = torch.Event(drawn.device) if drawn.is_cuda else None

    def start(self, generations: Sequence[Generation]) -> None:
        """Sets out with what was drawn last, row by row for these requests."""
        self.generations = tuple(generations)
        self._tokens.copy_(self._drawn, non_blocking=True)
        if self._arrived is not None:
            _record(self._arrived, self._drawn.device)

    def tokens(self) -> list[int]:
        """Waits for this step, and for no later one. A request that has ended meanwhile has a token all the same."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens[: len(self.generations)]


class Reading:
    """A prompt on its way through a GPU: one chunk at work and one behind it, so that the host sees how far it is.

    `event` makes one that tells the time.
    """

    def __init__(self, device: torch.device, event: Callable[[], torch.Event] | None = None) -> None:
        self._device = device
        self._event = event or (lambda: torch.Event(device, enable_timing=True))
        self._passed = [self._next()]

    def started_chunk(self) -> None:
        """After a chunk has been started: waits for the one before it."""
        self._passed.append(self._next())
        self._passed[-2].synchronize()

    def seconds(self) -> float:
        """From the beginning to the end of the last chunk, once that is done."""
        return float(self._passed[0].elapsed_time(self._passed[-1])) / 1e3

    def _next(self) -> torch.Event:
        event = self._event()
        _record(event, self._device)
        return event


def reading_on(device: torch.device) -> Reading | None:
    """None where the host does what it starts: there is nothing to wait for."""
    return Reading(device) if device.type == "cuda" else None


def _record(event: torch.Event, device: torch.device) -> None:
    """By its number a device's stream is found without asking which devices there are."""
    event.record(torch.accelerator.current_stream(device.index))

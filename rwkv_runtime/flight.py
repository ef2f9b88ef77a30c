"""Drawn tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

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
            # By its number a device's stream is found without asking which devices there are.
            self._arrived.record(torch.accelerator.current_stream(self._drawn.get_device()))

    def tokens(self) -> list[int]:
        """Waits for this step, and for no later one. A request that has ended meanwhile has a token all the same."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens[: len(self.generations)]

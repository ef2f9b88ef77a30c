"""Drawn tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_runtime.generation import Generation


class Flight:
    """The tokens that one step drew, row by row for these requests; the device goes on while they travel."""

    def __init__(self, drawn: Tensor, generations: Sequence[Generation]) -> None:
        self.generations = tuple(generations)
        self._tokens = drawn[: len(generations)].to("cpu", non_blocking=True, copy=True)  # into pinned memory
        self._arrived = torch.cuda.current_stream(drawn.device).record_event() if drawn.is_cuda else None

    def tokens(self) -> list[int]:
        """Waits for this step, and for no later one. A request that has ended meanwhile has a token all the same."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens

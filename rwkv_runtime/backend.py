"""How a model's arithmetic is executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from rwkv_runtime.model import Model
from rwkv_runtime.state import State


class Forward(Protocol):
    """tokens int64 [B, T] -> float32 logits of the last position [B, V], or of every position [B, T, V].

    The state, of B rows, is updated in place.
    """

    def __call__(self, tokens: Tensor, state: State, every: bool = False) -> Tensor: ...


Tick = Callable[[], None]
"""One decode step over static buffers."""


class Backend(ABC):
    """One way to execute a model.

    Whatever can fail (a missing compiler, a kernel that does not build) fails in `why_not`, `forward`
    or `freeze`, never in the middle of a text.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    priority: ClassVar[int] = 0
    """Of the backends usable for a model, `auto` takes the highest; a backend that fails gives way to the next."""

    def why_not(self, model: Model | None) -> str | None:
        """None where this backend can be used here, otherwise the reason, shown to the user.

        Without a model the answer is about the machine alone.
        """
        return None

    @abstractmethod
    def forward(self, model: Model) -> Forward:
        """Puts the forward pass together. Raises BackendError with the reason where that fails."""

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        """Compiles or captures one decode step; must leave `buffers`, which the tick changes, as it found them."""
        return tick

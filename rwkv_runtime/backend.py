"""How a model's arithmetic is executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
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


@dataclass(frozen=True)
class Outcome:
    """Where a decode step of B rows leaves what it drew: buffers that `Backend.settle` writes."""

    drawn: Tensor
    """int64 [B]: the tokens; -1 for a row where nothing could be drawn."""
    tokens: Tensor
    """int64 [B, 1]: what the next step reads; 0 after -1, so that a failed row goes on harmlessly."""
    position: Tensor
    """int64 [B, 1], where the sampler is: one further after each step."""
    before: Tensor
    """int64 [B, 1], there too: the position of what was drawn."""


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

        Without a model the answer is about the machine alone. Of a model, its dtype, its device and the dtype of its
        states are what a backend may not know.
        """
        return None

    def warm_up(self, device: torch.device, blank: Callable[[], Model]) -> None:  # noqa: B027
        """What takes long before `forward` and needs no weights: libraries, compilers.

        Called in a thread of its own while a file is opened and its weights are read; what it raises is logged, at the
        level of debugging. `blank()` waits until the file is open, and makes a model like the one to come, but of two
        layers, few ids and zeros (`blank.py`). It raises CancelledError where the file is wrong, or where a GPU has
        hardly room for a second model.
        """

    @abstractmethod
    def forward(self, model: Model) -> Forward:
        """Puts the forward pass together. Raises BackendError with the reason where that fails.

        Several engines, in threads of their own, may share it: a call leaves nothing behind but its state and logits.
        """

    def new_state(self, model: Model, rows: int) -> State:
        """The state that decode steps of these rows keep. One of a class of its own may hold more than the model's; it
        takes rows of the model's by `copy`, and gives them by `settled`."""
        return model.new_state(rows)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        """Compiles or captures one decode step; must leave `buffers`, which the tick changes, as it found them."""
        return tick

    def step(self, forward: Forward, tokens: Tensor, state: State, absent: Tensor | None, logits: Tensor) -> None:
        """The forward pass of a decode step: tokens int64 [B, 1] -> logits, a contiguous float32 buffer [B, V].

        `absent`, float32 [V], is added to each row: -inf for ids that the vocabulary does not have.
        """
        if absent is None:
            logits.copy_(forward(tokens, state))
        else:
            torch.add(forward(tokens, state), absent, out=logits)

    def settle(self, token: Tensor, logits: Tensor, refused: bool, outcome: Outcome) -> Tensor:
        """The end of a draw: a sampler's token, int64 [B], or -1 where it is none that may be drawn -> int64 [B].

        Refuses an id outside the vocabulary, one whose logit is not finite, and every token of a row of logits [B, V]
        that has NaN or +inf; the last unless the sampler itself has `refused` such rows. Fills `outcome`.
        """
        chosen = logits.gather(1, token.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
        valid = (token >= 0) & (token < logits.shape[1]) & chosen.isfinite()
        if not refused:
            valid &= logits.amax(dim=-1).isfinite()
        token = torch.where(valid, token, -1)
        outcome.drawn.copy_(token)
        outcome.tokens.copy_(token.clamp(min=0).unsqueeze(1))
        outcome.before.copy_(outcome.position)
        outcome.position.add_(1)
        return token


def chunk_size(device: torch.device, waited_for: bool = False) -> int:
    """Most tokens of a prompt read in one step. Other texts that are being written wait for it: then it is shorter.

    A GPU's matrix products want some thousand rows; a processor's gain little past some hundred.
    """
    if device.type != "cuda":
        return 512
    return 2048 if waited_for else 4096


def as_chunk(tokens: Sequence[int], device: torch.device) -> Tensor:
    """One token or more of one sequence as `Forward` takes them: int64 [1, T] on the device, which is not waited for.

    An array is made of a list in an eighth of the time that a tensor is, which for a long prompt shows.
    """
    return torch.frombuffer(array("q", tokens), dtype=torch.int64).unsqueeze(0).to(device, non_blocking=True)

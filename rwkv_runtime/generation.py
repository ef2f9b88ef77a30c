"""One request on its way through the engine: what was asked, the text so far, how it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rwkv_runtime.errors import RwkvError, SamplingError
from rwkv_runtime.observation import Observation
from rwkv_runtime.snapshot import RECENT, Snapshot
from rwkv_runtime.text import StopMatcher
from rwkv_runtime.tokenizer import Tokenizer

END_OF_TEXT = 0

Finish = Literal["length", "stop", "end", "time", "cancelled", "error"]
"""The budget of tokens; a stop string; the end-of-text token; the budget of seconds; the caller; a failed row."""


@dataclass(frozen=True)
class Request:
    """One text to write. The prompt follows what `start` has read; with neither, the model begins a text."""

    prompt: Sequence[int] = ()
    params: Mapping[str, object] = field(default_factory=dict)
    max_tokens: int = 512
    seed: int = 0
    stop: tuple[str, ...] = ()
    seconds: float | None = None
    start: Snapshot | None = None
    keep: bool = False
    """Whether to keep snapshots after the prompt and at the end, to go on from there."""
    observe: int = 0
    """How many candidates to note at each step, with their probabilities before and after each sampler."""


@dataclass
class Times:
    """Readings of time.perf_counter(): asked for, prompt first read, prompt read, first token, last token."""

    submitted: float
    started: float = 0.0
    prefilled: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Generation:
    """One request on its way: the text so far and how it ended."""

    def __init__(self, request: Request, params: Mapping[str, float | str], tokenizer: Tokenizer) -> None:
        self.request = request
        self.params = params
        start = request.start
        self.feed = [*(start.pending if start else ()), *request.prompt] or [END_OF_TEXT]
        self.before = start.recent if start else ()  # tokens read before the feed
        self.read = 0  # how many of `feed` the state has read
        self.position = start.position if start else 0
        self.tokens: list[int] = []
        self.pieces: deque[str] = deque()  # not yet taken by the caller
        self.finish: Finish | None = None
        self.error: RwkvError | None = None
        self.snapshot: Snapshot | None = None  # at the end
        self.prompt_snapshot: Snapshot | None = None  # after the prompt
        self.observations: list[Observation] = []  # one a token, where the request asks for them
        self.times = Times(time.perf_counter())
        self._stream = tokenizer.stream()
        self._stops = StopMatcher(request.stop)
        self._text = bytearray()  # in UTF-8; a str that is added to is copied each time, 0.1 ms at 100,000 tokens

    @property
    def text(self) -> str:
        """What has been written so far."""
        return self._text.decode()

    def accept(self, token: int) -> Finish | None:
        """Takes a drawn token; returns why the text ends here, if it does."""
        self.times.last = time.perf_counter()
        self.times.first = self.times.first or self.times.last
        if token < 0:
            self.error = SamplingError(
                f"token {len(self.tokens) + 1} of this text cannot be drawn: its logits are not finite, or nothing "
                "is left to choose from"
            )
            return "error"
        self.tokens.append(token)
        if token == END_OF_TEXT:
            return "end"
        self._show(self._stops.push(self._stream.push(token)))
        if self._stops.found is not None:
            return "stop"
        if len(self.tokens) >= self.request.max_tokens:
            return "length"
        return "time" if self.overdue(self.times.last) else None

    def overdue(self, now: float) -> bool:
        """Whether the budget of seconds is spent at a reading of time.perf_counter()."""
        limit = self.request.seconds
        return limit is not None and now - self.times.started >= limit

    def recent(self) -> tuple[int, ...]:
        """The last tokens of all that belongs to this text, as far as samplers are told of them."""
        return (*self.before, *self.feed, *self.tokens)[-RECENT:]

    def close(self, finish: Finish) -> None:
        self.finish = finish
        self._show(self._stops.push(self._stream.finish()))
        self._show(self._stops.finish())

    def _show(self, text: str) -> None:
        if text:
            self._text += text.encode()
            self.pieces.append(text)

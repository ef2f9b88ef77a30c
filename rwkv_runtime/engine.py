"""The engine: rows of a batch, prefill in chunks, one decode step for all, text as it comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, Tick
from rwkv_runtime.errors import BackendError, OptionError, RwkvError, SamplingError
from rwkv_runtime.model import Model
from rwkv_runtime.sampler import Controls, Sampler, check_params
from rwkv_runtime.snapshot import Snapshot as Snapshot
from rwkv_runtime.text import StopMatcher
from rwkv_runtime.tokenizer import Tokenizer

CHUNK = 512
"""Most tokens of a prompt read in one step; other requests wait for no more than this."""
END_OF_TEXT = 0

Finish = Literal["length", "stop", "end", "time", "cancelled", "error"]
"""The budget of tokens; a stop string; the end-of-text token; the budget of seconds; the caller; a failed row."""


@dataclass(frozen=True)
class Request:
    """One text to write. The prompt follows what `start` has read; with neither, the model begins a text."""

    prompt: Sequence[int] = ()
    params: Mapping[str, object] = field(default_factory=dict)
    max_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    seconds: float | None = None
    start: Snapshot | None = None
    keep: bool = False
    """Whether to keep snapshots after the prompt and at the end, to go on from there."""


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

    def __init__(self, request: Request, params: Mapping[str, float], tokenizer: Tokenizer) -> None:
        self.request = request
        self.params = params
        start = request.start
        self.feed = [*(start.pending if start else ()), *request.prompt] or [END_OF_TEXT]
        self.read = 0  # how many of `feed` the state has read
        self.position = start.position if start else 0
        self.tokens: list[int] = []
        self.text = ""
        self.pieces: deque[str] = deque()  # not yet taken by the caller
        self.finish: Finish | None = None
        self.error: RwkvError | None = None
        self.snapshot: Snapshot | None = None  # at the end
        self.prompt_snapshot: Snapshot | None = None  # after the prompt
        self.times = Times(time.perf_counter())
        self._stream = tokenizer.stream()
        self._stops = StopMatcher(request.stop)

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
        limit = self.request.seconds
        return "time" if limit is not None and self.times.last - self.times.started >= limit else None

    def close(self, finish: Finish) -> None:
        self.finish = finish
        self._show(self._stops.push(self._stream.finish()))
        self._show(self._stops.finish())

    def _show(self, text: str) -> None:
        if text:
            self.text += text
            self.pieces.append(text)


class Engine:
    """Runs many requests through one batch of `rows` rows; rows 0..active-1 are always the ones at work.

    Raises BackendError where the backend cannot prepare its forward pass or its decode step.
    """

    def __init__(self, model: Model, backend: Backend, sampler: Sampler, tokenizer: Tokenizer, rows: int = 1) -> None:
        self.model, self.backend, self.sampler, self.tokenizer = model, backend, sampler, tokenizer
        self.rows = rows
        V, device = model.config.vocab_size, model.device
        self.state = model.new_state(rows)
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.logits = torch.zeros((rows, V), dtype=torch.float32, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        sampling_device = torch.device("cpu") if sampler.runs == "host" else device
        self.controls = Controls.allocate(sampler, rows, V, sampling_device)
        self.absent = _absent_mask(tokenizer, V, device)
        self.waiting: deque[Generation] = deque()
        self.active: list[Generation] = []
        self.prefilling: Generation | None = None
        self._scratch = model.new_state(1)
        self._ticks: dict[int, Tick] = {}
        try:
            self.forward = backend.forward(model)
            self._tick(1)
        except RwkvError:
            raise
        except Exception as error:  # whatever a backend's compiler raises is that backend's failure
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(reason[0]) from error

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises OptionError for a parameter the sampler does not take, StateError for a
        state of another model."""
        if request.max_tokens < 1:
            raise OptionError(f"max_tokens is a whole number from 1, not {request.max_tokens}")
        generation = Generation(request, check_params(self.sampler, request.params), self.tokenizer)
        bad = [t for t in generation.feed if not 0 <= t < self.model.config.vocab_size]
        if bad:
            raise OptionError(f"token id {bad[0]} is not in the model's vocabulary of {self.model.config.vocab_size}")
        if request.start:
            self.state.check(request.start.state)
        self.waiting.append(generation)
        return generation

    def step(self) -> None:
        """One chunk of one prompt, if any waits, then one token for every active row."""
        if self.prefilling is None and self.waiting and len(self.active) < self.rows:
            self._begin(self.waiting.popleft())
        if self.prefilling is not None:
            self._prefill(self.prefilling)
        if self.active:
            self._decode()

    def stream(self, generation: Generation) -> Iterator[str]:
        """The text of one request as it comes; others in the engine advance beside it. Leaving early cancels it.

        Raises SamplingError where its row failed; the text until then has been given.
        """
        try:
            while generation.pieces or generation.finish is None:
                if generation.pieces:
                    yield generation.pieces.popleft()
                else:
                    self.step()
        finally:
            self.cancel(generation)
        if generation.error:
            raise generation.error

    def cancel(self, generation: Generation) -> None:
        """Ends a request wherever it is; what it has written is kept."""
        if generation.finish is not None:
            return
        if generation in self.active:
            self._retire(self.active.index(generation), "cancelled")
            return
        if generation is self.prefilling:
            self.prefilling = None
        else:
            self.waiting.remove(generation)
        generation.close("cancelled")

    def _begin(self, generation: Generation) -> None:
        generation.times.started = time.perf_counter()
        self.prefilling = generation
        start = generation.request.start
        if start:
            self._scratch.copy(start.state, 0, 0)
        else:
            self._scratch.clear(0)

    def _prefill(self, generation: Generation) -> None:
        """Reads one chunk of the prompt; the last token is left to the decode step, which draws from its logits."""
        left = len(generation.feed) - 1 - generation.read
        if left:
            size = min(left, CHUNK)
            chunk = generation.feed[generation.read : generation.read + size]
            self.forward(torch.tensor([chunk], device=self.model.device), self._scratch)
            generation.read += size
            if size < left:
                return
        generation.times.prefilled = time.perf_counter()
        generation.position += generation.read
        if generation.request.keep:
            snapshot = Snapshot(self._scratch.clone(), (generation.feed[-1],), generation.position)
            generation.prompt_snapshot = snapshot
        row = len(self.active)
        self.state.copy(self._scratch, 0, row)
        self.tokens[row] = generation.feed[-1]
        self.controls.set(row, generation.params, generation.request.seed, generation.position)
        self.active.append(generation)
        self.prefilling = None

    def _decode(self) -> None:
        size = min(s for s in _sizes(self.rows) if s >= len(self.active))
        self._tick(size)()
        drawn = self.drawn[: len(self.active)].tolist()  # the one transfer of a step
        for row in reversed(range(len(drawn))):
            self.active[row].position += 1
            finish = self.active[row].accept(drawn[row])
            if finish:
                self._retire(row, finish)

    def _retire(self, row: int, finish: Finish) -> None:
        """Ends the request of a row and moves the last active row into its place."""
        generation = self.active[row]
        if generation.request.keep and finish != "error":
            pending = tuple(generation.tokens[-1:]) or (generation.feed[-1],)
            generation.snapshot = Snapshot(self.state.view(row, row + 1).clone(), pending, generation.position)
        generation.close(finish)
        last = len(self.active) - 1
        if row != last:
            self.state.copy(self.state, last, row)
            self.tokens[row].copy_(self.tokens[last])
            self.controls.move(last, row)
            self.active[row] = self.active[last]
        self.active.pop()

    def _tick(self, size: int) -> Tick:
        if size not in self._ticks:
            self._ticks[size] = self._build_tick(size)
        return self._ticks[size]

    def _build_tick(self, size: int) -> Tick:
        """One decode step of the first `size` rows, frozen as far as the sampler allows."""
        forward, sampler, absent = self.forward, self.sampler, self.absent
        tokens, state, controls = self.tokens[:size], self.state.view(0, size), self.controls.view(size)
        logits, drawn = self.logits[:size], self.drawn[:size]

        def think() -> None:
            logits.copy_(forward(tokens, state))

        def draw() -> None:
            z = logits if absent is None else logits + absent
            z = z.to(controls.seed.device)
            token = sampler.sample(z, controls)
            chosen = z.gather(1, token.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
            valid = z.amax(dim=-1).isfinite() & (token >= 0) & (token < z.shape[1]) & (chosen > -torch.inf)
            token = torch.where(valid, token, -1)
            sampler.update(token, controls)
            drawn.copy_(token)
            tokens.copy_(token.clamp(min=0).unsqueeze(1))  # a failed row goes on harmlessly until it is retired
            controls.position.add_(1)

        def both() -> None:
            think()
            draw()

        buffers = [*state.tensors.values(), logits]
        if sampler.runs == "graph":
            return self.backend.freeze(both, [*buffers, tokens, drawn, *controls.buffers()])
        frozen = self.backend.freeze(think, buffers)

        def apart() -> None:
            frozen()
            draw()

        return apart

    def sampling_seconds(self, repeats: int = 20) -> float:
        """Median time of one draw for one row, measured now, apart from the forward pass; for the user's figures."""
        controls, logits = self.controls.view(1), self.logits[:1].to(self.controls.seed.device)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self.sampler.sample(logits, controls).tolist()
            times.append(time.perf_counter() - begin)
        return sorted(times)[repeats // 2]


def _sizes(rows: int) -> list[int]:
    """Batch sizes the decode step is prepared for: powers of two, and all rows."""
    sizes = [1]
    while sizes[-1] * 2 < rows:
        sizes.append(sizes[-1] * 2)
    return [*sizes, rows] if rows > sizes[-1] else sizes


def _absent_mask(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor | None:
    """0 for ids that may be drawn, -inf for those the vocabulary does not have; None where it has all."""
    absent = tokenizer.absent(vocab_size)
    if not absent:
        return None
    mask = torch.zeros(vocab_size, device=device)
    mask[absent] = -torch.inf
    return mask

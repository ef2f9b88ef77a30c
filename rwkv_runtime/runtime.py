"""The public API of a loaded model: write text, read logits, with the backend that runs it."""

from __future__ import annotations

import logging
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, as_chunk, chunk_size
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import BackendError, OptionError, RwkvError, StateError
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.state import State
from rwkv_runtime.tokenizer import Tokenizer

AUTO = "auto"
ENGINES = 4
"""How many engines, each with its batch of states, a runtime keeps for the next text."""
logger = logging.getLogger("rwkv_runtime")


def in_order(plugins: Plugins, name: str = AUTO) -> list[Backend]:
    """The backend of that name, then all others, the best first. Raises OptionError where there is none."""
    everyone = sorted(plugins.backends, key=lambda b: -b.priority)
    if name == AUTO:
        return everyone
    chosen = plugins.backends.get(name)
    return [chosen, *(b for b in everyone if b is not chosen)]


class Writing(Iterator[str]):
    """A text as it is written, piece by piece; `generation` has its tokens, how it ended and what was observed."""

    def __init__(self, engine: Engine, generation: Generation) -> None:
        self.generation = generation
        self._engine = engine
        self._pieces = _written(engine, generation)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the text here; what was written is kept."""
        self._engine.cancel(self.generation)


def _written(engine: Engine, generation: Generation) -> Iterator[str]:
    """Queued when the first piece is asked for: a text nobody reads holds up no other.

    It does not know its `Writing`, whose end is then this one's, at once.
    """
    if generation.finish is None:
        yield from engine.stream(engine.enqueue(generation))


class Runtime:
    """A loaded model with its vocabulary and the backend that runs it."""

    def __init__(self, model: Model, tokenizer: Tokenizer, plugins: Plugins, backend: str = AUTO) -> None:
        """Raises OptionError for a backend that does not exist; one that cannot be used here gives way to the
        next best, with a logged warning."""
        self.model = model
        self.tokenizer = tokenizer
        self.plugins = plugins
        self._candidates = in_order(plugins, backend)
        self.backend = self._candidates.pop(0)
        if (reason := why_not(self.backend, model)) is not None:
            self._give_way(reason, quiet=backend == AUTO)
        self._prepare()
        self._engines: dict[tuple[str, int], Engine] = {}

    def _give_way(self, reason: str, quiet: bool = False) -> None:
        """Moves on to the next backend that is usable. Raises BackendError where there is none."""
        failed = self.backend
        while self._candidates:
            self.backend = self._candidates.pop(0)
            if why_not(self.backend, self.model) is None:
                if not quiet:
                    logger.warning(f"backend {failed.name}: {reason}; using {self.backend.name} instead")
                return
        raise BackendError(f"backend {failed.name}: {reason}; no other backend can run this model here")

    def _prepare(self) -> None:
        while True:
            try:
                self._forward = self.backend.forward(self.model)
                return
            except Exception as error:  # a stranger's backend may raise anything; its reason is shown
                self._give_way(_reason(error))

    def engine(self, sampler: str = "nucleus", rows: int = 1) -> Engine:
        """The engine for a sampler (or chain) and a number of rows, prepared once. Raises OptionError for either, and
        torch.OutOfMemoryError where a GPU has no room for so many rows."""
        if type(rows) is not int or rows < 1:
            raise OptionError(f"rows is a whole number from 1, not {rows!r}")
        key = sampler, rows
        if key in self._engines:
            self._engines[key] = self._engines.pop(key)  # the latest is the last to be given up
        while key not in self._engines:
            chosen = self.plugins.sampler(sampler)
            try:
                engine = Engine(self.model, self.backend, chosen, self.tokenizer, rows, forward=self._forward)
                self._engines = dict([*self._engines.items(), (key, engine)][-ENGINES:])
            except BackendError as error:
                self._give_way(str(error))
                self._prepare()
                self._engines.clear()
        return self._engines[key]

    def request(
        self,
        prompt: str | Sequence[int] = "",
        *,
        max_tokens: int = 512,
        seed: int | None = None,
        stop: Iterable[str] | str = (),
        seconds: float | None = None,
        logprobs: int = 0,
        **params: Any,
    ) -> Request:
        """A request as `generate` makes it; seed None draws one. Raises OptionError for a prompt of another type."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        seed = random.getrandbits(32) if seed is None else seed
        return Request(tokens, params, max_tokens, seed, stops, seconds, observe=logprobs)

    def generate(
        self,
        prompt: str | Sequence[int] = "",
        *,
        sampler: str = "nucleus",
        max_tokens: int = 512,
        seed: int | None = None,
        stop: Iterable[str] | str = (),
        seconds: float | None = None,
        logprobs: int = 0,
        **params: Any,
    ) -> Writing:
        """Writes on from a prompt, piece by piece.

        It ends at `max_tokens`, at a stop string (which is not given out), at the end-of-text token or after
        `seconds`. `params` are the sampler's. With `logprobs` the result's `generation.observations` hold, for every
        token, its log-probability and those of the likeliest alternatives, before and after sampling. Raises
        OptionError before anything is written, SamplingError where no token can be drawn.
        """
        engine = self.engine(sampler)
        request = self.request(
            prompt, max_tokens=max_tokens, seed=seed, stop=stop, seconds=seconds, logprobs=logprobs, **params
        )
        return Writing(engine, engine.check(request))

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        sampler: str = "nucleus",
        max_tokens: int = 512,
        seed: int | None = None,
        stop: Iterable[str] | str = (),
        rows: int = 8,
        **params: Any,
    ) -> list[str]:
        """Writes on from many prompts through one batch; the texts come back in the prompts' order.

        Prompt i uses seed + i. Raises OptionError for what cannot be right, SamplingError where a row failed.
        """
        if isinstance(prompts, str):
            raise OptionError("prompts is a list of texts, not a text")
        if seed is not None and type(seed) is not int:
            raise OptionError(f"seed is a whole number, not {seed!r}")
        engine = self.engine(sampler, rows)
        seed = random.getrandbits(32) if seed is None else seed
        generations: list[Generation] = []
        try:
            for i, prompt in enumerate(prompts):
                request = self.request(prompt, max_tokens=max_tokens, seed=seed + i, stop=stop, **params)
                generations.append(engine.submit(request))
            return ["".join(engine.stream(generation)) for generation in generations]
        finally:
            for generation in generations:  # where one failed, the others do not go on unseen
                engine.cancel(generation)

    def forward(self, tokens: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
        """Reads tokens: float32 logits of the last one [V], and the state after it; the given state is not changed.

        Raises OptionError for no tokens or an id that is not in the vocabulary, StateError for another model's state.
        """
        tokens, state = self._ids(tokens), self._start(state)
        for chunk in _chunks(tokens, chunk_size(self.model.device)):
            logits = self._forward(as_chunk(chunk, self.model.device), state)
        return logits[0], state

    def logits(self, tokens: Sequence[int], state: State | None = None) -> Tensor:
        """float32 logits after every token, [T, V]: for evaluation. Raises as `forward` does."""
        tokens, state = self._ids(tokens), self._start(state)
        rows = [
            self._forward(as_chunk(chunk, self.model.device), state, every=True)[0]
            for chunk in _chunks(tokens, chunk_size(self.model.device, waited_for=True))  # all logits take much room
        ]
        return torch.cat(rows)

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        V, ids = self.model.config.vocab_size, token_ids(tokens)
        if not ids or not all(0 <= t < V for t in ids):
            raise OptionError(f"one token id or more is needed, each from 0 to {V - 1}")
        return ids

    def _start(self, state: State | None) -> State:
        fresh = self.model.new_state()
        if state is not None:
            if not isinstance(state, State):
                raise StateError(f"a state is what `forward` gives, not {type(state).__name__}")
            if state.rows != 1:
                raise StateError(f"a state of {state.rows} rows; one of a single row is expected")
            fresh.copy(state, 0, 0)
        return fresh


def token_ids(tokens: Iterable[int]) -> list[int]:
    """Raises OptionError for anything but whole numbers."""
    try:
        if not isinstance(tokens, bytes):
            return [operator.index(token) for token in tokens]
        raise TypeError
    except TypeError:
        raise OptionError(f"token ids are a list of whole numbers, not {tokens!r:.40}") from None


def _chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def usable(plugins: Plugins, model: Model | None = None) -> Mapping[str, str | None]:
    """Every backend with None where it is usable here, else the reason it is not."""
    return {backend.name: why_not(backend, model) for backend in plugins.backends}


def why_not(backend: Backend, model: Model | None) -> str | None:
    """None where the backend is usable here, else its reason; one that cannot even say so is not."""
    try:
        return backend.why_not(model)
    except Exception as error:  # a stranger's backend may raise anything; its reason is shown
        return _reason(error)


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()
    if isinstance(error, RwkvError) and first:
        return first[0]
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__

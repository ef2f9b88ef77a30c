"""The engine: requests that come and go, prompts read in chunks, one decode step for all, text as it comes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import torch

from rwkv_runtime.backend import Backend, Forward, as_chunk, chunk_size
from rwkv_runtime.batch import Batch
from rwkv_runtime.errors import OptionError, PluginError, RwkvError
from rwkv_runtime.flight import Flight, Reading, reading_on
from rwkv_runtime.generation import Finish, Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.sampler import Sampler, check_params
from rwkv_runtime.snapshot import Snapshot
from rwkv_runtime.state import State
from rwkv_runtime.tokenizer import Tokenizer


class Engine(Batch):
    """Runs many requests through one batch of `rows` rows; rows 0..active-1 are always the ones at work.

    With a `lag` of 1 the tokens of a step are read when the next one has been started, so that a GPU never waits for
    the host; a text that turns out to have ended then drew one token too many, which is dropped. None: 1 on a GPU.
    `forward` is the backend's forward pass of this model where there is one already; engines may share one.
    Raises BackendError where the backend cannot prepare its forward pass or its decode step, torch.OutOfMemoryError
    where a GPU has no room for so many rows.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        sampler: Sampler,
        tokenizer: Tokenizer,
        rows: int = 1,
        lag: int | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__(model, backend, sampler, tokenizer, rows, forward)
        self.lag = usual_lag(model.device, sampler) if lag is None else lag
        self.waiting: deque[Generation] = deque()
        self.active: list[Generation] = []
        self.prefilling: Generation | None = None
        self._turn = threading.RLock()  # texts of several threads advance together, a step at a time
        self._scratch = model.new_state(1)
        self._inference = torch.inference_mode()  # a tenth of a small model's step would be autograd's bookkeeping
        self._flights = deque(Flight(self.drawn) for _ in range(2))  # the next to start, and the other
        self._flight: Flight | None = None  # what a step drew that has not been read
        self._readings: dict[Generation, Reading] = {}  # on a GPU, of prompts whose end the host has not seen
        self._before: State | None = None  # the rows as they were before that step

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises as `check` does."""
        return self.enqueue(self.check(request))

    def enqueue(self, generation: Generation) -> Generation:
        """Queues what `check` made ready."""
        self.waiting.append(generation)
        return generation

    def check(self, request: Request) -> Generation:
        """The request made ready. Raises OptionError for a setting or a parameter that is not valid, StateError for
        a state of another model."""
        for name, value, low in (("max_tokens", request.max_tokens, 1), ("logprobs", request.observe, 0)):
            if type(value) is not int or value < low:
                raise OptionError(f"{name} is a whole number from {low}, not {value!r}")
        seconds = request.seconds
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise OptionError(f"seconds is a number above 0, not {request.seconds!r}")
        if type(request.seed) is not int:
            raise OptionError(f"seed is a whole number, not {request.seed!r}")
        generation = Generation(request, check_params(self.sampler, request.params), self.tokenizer)
        bad = [t for t in generation.feed if not 0 <= t < self.model.config.vocab_size]
        if bad:
            raise OptionError(f"token id {bad[0]} is not in the model's vocabulary of {self.model.config.vocab_size}")
        if not all(isinstance(stop, str) for stop in request.stop):
            raise OptionError("stop is a text or a list of texts")
        if request.start:
            self.state.check(request.start.state)
        return generation

    def step(self) -> None:
        """One chunk of one prompt, if any waits, then one token for every active row."""
        with self._turn, self._inference:
            self._step()

    def _step(self) -> None:
        if self.prefilling is None and self.waiting and len(self.active) < self.rows:
            self._begin(self.waiting.popleft())
        if self.prefilling is not None:
            if self.prefilling.overdue(time.perf_counter()):
                self._give_up(self.prefilling, "time")
            else:
                self._prefill(self.prefilling)
        if self.active:
            self._decode()

    def stream(self, generation: Generation) -> Iterator[str]:
        """The text of one request as it comes; others in the engine advance beside it. Leaving early cancels it.

        Raises SamplingError where its row failed; the text until then has been given.
        """
        try:
            while True:
                with self._turn:
                    if not generation.pieces and generation.finish is None:
                        self.step()
                    piece = generation.pieces.popleft() if generation.pieces else None
                    ended = generation.finish is not None
                if piece is not None:
                    yield piece
                elif ended:
                    break
        finally:
            self.cancel(generation)
        if generation.error:
            raise generation.error

    def cancel(self, generation: Generation) -> None:
        """Ends a request wherever it is; what it has written is kept."""
        with self._turn, torch.inference_mode():
            self._cancel(generation)

    def _cancel(self, generation: Generation) -> None:
        if generation.finish is not None:
            return
        if generation in self.active:
            self._retire(self.active.index(generation), "cancelled")
        else:
            self._give_up(generation, "cancelled")

    def _give_up(self, generation: Generation, finish: Finish) -> None:
        """Ends a request that has no row yet."""
        self._readings.pop(generation, None)
        if generation is self.prefilling:
            self.prefilling = None
        elif generation in self.waiting:
            self.waiting.remove(generation)
        generation.close(finish)

    def _begin(self, generation: Generation) -> None:
        generation.times.started = time.perf_counter()
        self.prefilling = generation
        if reading := reading_on(self.drawn.device):
            self._readings[generation] = reading
        start = generation.request.start
        if start:
            self._scratch.copy(start.state, 0, 0)
        else:
            self._scratch.clear(0)

    def _prefill(self, generation: Generation) -> None:
        """Reads one chunk of the prompt; the last token is left to the decode step, which draws from its logits."""
        left = len(generation.feed) - 1 - generation.read
        if left:
            size = min(left, chunk_size(self.model.device, waited_for=bool(self.active)))
            chunk = generation.feed[generation.read : generation.read + size]
            self.forward(as_chunk(chunk, self.model.device), self._scratch)
            if generation in self._readings:
                self._readings[generation].started_chunk()
            generation.read += size
            if size < left:
                return
        generation.times.prefilled = time.perf_counter()
        generation.position += generation.read
        if generation.request.keep:
            generation.prompt_snapshot = _snapshot(generation, self._scratch.clone())
        self._admit(generation, len(self.active))
        self.prefilling = None

    def _admit(self, generation: Generation, row: int) -> None:
        """Gives a request whose prompt has been read its row."""
        self.state.copy(self._scratch, 0, row)
        self.tokens[row] = generation.feed[-1]
        self.controls.set(row, generation.params, generation.request.seed, generation.position)
        recent = torch.tensor(generation.recent(), dtype=torch.int64, device=self.controls.seed.device)
        try:
            self.sampler.prime(recent, self.controls.view(row, row + 1))
        except Exception as error:  # a setting that only the row's start can judge costs that row alone
            reason = f"sampler {self.sampler.name} cannot begin: {type(error).__name__}: {error}"
            generation.error = error if isinstance(error, RwkvError) else PluginError(reason)
            generation.close("error")
        else:
            self.active.append(generation)

    def _decode(self) -> None:
        """Starts a step and reads what the one before it drew; without lag, what it draws itself."""
        try:
            observed = any(generation.request.observe for generation in self.active)
            if observed or all(self._last_is_under_way(generation) for generation in self.active):
                self._land()  # there is nothing to start meanwhile
            if self.active:
                earlier = self._flight
                self._launch(observed)
                self._accept(earlier)
                if observed or not self.lag:
                    self._land()
        except (RwkvError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a stranger's sampler may raise anything
            names = f"sampler {self.sampler.name}, backend {self.backend.name}"
            raise PluginError(f"a step failed ({names}): {type(error).__name__}: {error}") from error

    def _launch(self, observed: bool) -> None:
        """Starts one step of all active rows."""
        size = min(s for s in self._ticks if s >= len(self.active))
        if self.lag and any(generation.request.keep for generation in self.active):
            self._remember()
        if observed:
            seen = self.watched_tick(size)
            for row, generation in enumerate(self.active):
                if count := generation.request.observe:
                    generation.observations.append(seen.row(row, int(self.drawn[row]), count))
        else:
            self._ticks[size]()
        self._flight = self._flights[0]
        self._flights.rotate()
        self._flight.start(self.active)

    def _land(self) -> None:
        """Reads what is under way, so that nothing is."""
        flight, self._flight = self._flight, None
        self._accept(flight)

    def _accept(self, flight: Flight | None) -> None:
        """Gives the tokens of a step to the texts that have not ended since it was started."""
        if flight is None:
            return
        for generation, token in zip(flight.generations, flight.tokens(), strict=True):
            if generation.finish is None:
                generation.position += 1
                if reading := self._readings.pop(generation, None):
                    generation.times.prefilled = generation.times.started + reading.seconds()
                if finish := generation.accept(token):
                    self._retire(self.active.index(generation), finish)

    def _under_way(self, generation: Generation) -> bool:
        return self._flight is not None and generation in self._flight.generations

    def _last_is_under_way(self, generation: Generation) -> bool:
        return len(generation.tokens) + 1 >= generation.request.max_tokens and self._under_way(generation)

    def _remember(self) -> None:
        """Keeps the states that the next step will change: a text that ended before it has not read its last token."""
        if self._before is None:
            with torch.inference_mode(False):
                self._before = self.state.clone()
        for name, t in self.state.view(0, len(self.active)).tensors.items():
            self._before[name][:, : t.shape[1]].copy_(t)

    def _retire(self, row: int, finish: Finish) -> None:
        """Ends the request of a row and moves the last active row into its place."""
        generation = self.active[row]
        self._readings.pop(generation, None)
        if generation.request.keep and finish != "error":
            state = self._before if self._before is not None and self._under_way(generation) else self.state
            generation.snapshot = _snapshot(generation, state.settled(row))
        generation.close(finish)
        last = len(self.active) - 1
        if row != last:
            self.move(last, row)
            if self._before is not None:
                self._before.copy(self._before, last, row)
            self.active[row] = self.active[last]
        self.controls.notes[last].clear()  # what a sampler keeps there may be large, and idle rows are drawn for too
        self.active.pop()
        if not self.active:
            self._flight = None


def usual_lag(device: torch.device, sampler: Sampler) -> int:
    """1 where the device works on by itself while the host reads: on a GPU, unless the host itself samples."""
    return int(device.type == "cuda" and sampler.runs != "host")


def _snapshot(generation: Generation, state: State) -> Snapshot:
    """Where a text stands: all but the last token has been read."""
    recent = generation.recent()
    return Snapshot(state, recent[-1:], generation.position, recent[:-1])

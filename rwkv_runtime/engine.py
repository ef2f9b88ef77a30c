"""The engine: rows of a batch, prefill in chunks, one decode step for all, text as it comes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, Tick
from rwkv_runtime.controls import Controls
from rwkv_runtime.errors import BackendError, OptionError, PluginError, RwkvError
from rwkv_runtime.generation import Finish, Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.observation import observe
from rwkv_runtime.sampler import Sampler, check_params
from rwkv_runtime.snapshot import Snapshot
from rwkv_runtime.state import State
from rwkv_runtime.tokenizer import Tokenizer

CHUNK = 512
"""Most tokens of a prompt read in one step; other requests wait for no more than this."""
logger = logging.getLogger("rwkv_runtime")


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
        self.controls = Controls.allocate(sampler, rows, V, sampling_device, tokenizer)
        self.absent = _absent_mask(tokenizer, V, device)
        self.waiting: deque[Generation] = deque()
        self.active: list[Generation] = []
        self.prefilling: Generation | None = None
        self._scratch = model.new_state(1)
        try:
            self.forward = backend.forward(model)
            with torch.inference_mode():
                self._ticks = {size: self._build_tick(size) for size in _sizes(rows)}
        except RwkvError:
            raise
        except Exception as error:  # whatever a backend's compiler raises is that backend's failure
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(reason[0]) from error

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
        if type(request.seed) is not int:
            raise OptionError(f"seed is a whole number, not {request.seed!r}")
        generation = Generation(request, check_params(self.sampler, request.params), self.tokenizer)
        bad = [t for t in generation.feed if not 0 <= t < self.model.config.vocab_size]
        if bad:
            raise OptionError(f"token id {bad[0]} is not in the model's vocabulary of {self.model.config.vocab_size}")
        if request.start:
            self.state.check(request.start.state)
        return generation

    @torch.inference_mode()  # a tenth of a small model's step is autograd's bookkeeping
    def step(self) -> None:
        """One chunk of one prompt, if any waits, then one token for every active row."""
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
        else:
            self._give_up(generation, "cancelled")

    def _give_up(self, generation: Generation, finish: Finish) -> None:
        """Ends a request that has no row yet."""
        if generation is self.prefilling:
            self.prefilling = None
        else:
            self.waiting.remove(generation)
        generation.close(finish)

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
        except RwkvError as error:  # a setting that only the row's start can judge costs that row alone
            generation.error = error
            generation.close("error")
        else:
            self.active.append(generation)

    def _decode(self) -> None:
        size = min(s for s in self._ticks if s >= len(self.active))
        try:
            if any(generation.request.observe for generation in self.active):
                self._observed_tick(size)
            else:
                self._ticks[size]()
        except RwkvError:
            raise
        except Exception as error:  # a stranger's sampler may raise anything
            names = f"sampler {self.sampler.name}, backend {self.backend.name}"
            raise PluginError(f"a step failed ({names}): {type(error).__name__}: {error}") from error
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
            generation.snapshot = _snapshot(generation, self.state.view(row, row + 1).clone())
        generation.close(finish)
        last = len(self.active) - 1
        if row != last:
            self.state.copy(self.state, last, row)
            self.tokens[row].copy_(self.tokens[last])
            self.controls.move(last, row)
            self.active[row] = self.active[last]
        self.controls.notes[last].clear()  # what a sampler keeps there may be large, and idle rows are drawn for too
        self.active.pop()

    def _build_tick(self, size: int) -> Tick:
        """One decode step of the first `size` rows, frozen as far as the sampler allows."""
        think, draw = self._think(size), self._draw(size)

        def both() -> None:
            think()
            draw()

        state, controls = self.state.view(0, size), self.controls.view(0, size)
        buffers = [*state.tensors.values(), self.logits[:size]]
        problem = None
        if self.sampler.runs == "graph":
            try:
                return self.backend.freeze(both, [*buffers, self.tokens[:size], self.drawn[:size], *controls.buffers()])
            except Exception as error:  # the sampler's fault, if the forward pass alone can be frozen
                problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        frozen = self.backend.freeze(think, buffers)
        if problem:
            logger.warning(
                f"sampler {self.sampler.name} cannot be part of backend {self.backend.name}'s graph ({problem}); "
                "it runs beside it"
            )

        def apart() -> None:
            frozen()
            draw()

        return apart

    def _think(self, size: int) -> Tick:
        """The forward pass of a step: tokens -> logits."""
        forward, tokens, state, logits = self.forward, self.tokens[:size], self.state.view(0, size), self.logits[:size]

        def think() -> None:
            logits.copy_(forward(tokens, state))

        return think

    def _draw(self, size: int, watch: Callable[[Tensor], None] | None = None) -> Tick:
        """The draw of a step: logits -> tokens. `watch` sees the logits that the sampler is given."""
        sampler, absent, controls = self.sampler, self.absent, self.controls.view(0, size)
        tokens, logits, drawn = self.tokens[:size], self.logits[:size], self.drawn[:size]

        def draw() -> None:
            sampler.prepare(controls)
            z = logits if absent is None else logits + absent
            z = z.to(controls.seed.device)
            if watch is not None:
                watch(z)
            token = sampler.sample(z, controls)
            chosen = z.gather(1, token.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
            valid = z.amax(dim=-1).isfinite() & (token >= 0) & (token < z.shape[1]) & (chosen > -torch.inf)
            token = torch.where(valid, token, -1)
            sampler.update(token, z, controls)
            drawn.copy_(token)
            tokens.copy_(token.clamp(min=0).unsqueeze(1))  # a failed row goes on harmlessly until it is retired
            controls.position.add_(1)

        return draw

    def _observed_tick(self, size: int) -> None:
        """A step in the open, nothing frozen, that notes the candidates of rows whose requests ask for them."""
        seen = []
        self._think(size)()
        self._draw(size, lambda z: seen.append(observe(self.sampler, z, self.controls.view(0, size))))()
        for row, generation in enumerate(self.active):
            if count := generation.request.observe:
                generation.observations.append(seen[0].row(row, int(self.drawn[row]), count))

    def sampling_seconds(self, repeats: int = 20) -> float:
        """Median time of one draw for one row, measured now, apart from the forward pass; for the user's figures."""
        controls, logits = self.controls.view(0, 1).clone(), self.logits[:1].to(self.controls.seed.device)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self.sampler.sample(logits, controls).tolist()
            times.append(time.perf_counter() - begin)
        return sorted(times)[repeats // 2]


def _sizes(rows: int) -> list[int]:
    """Batch sizes the decode step is prepared for, before any text is begun: powers of four, and all rows."""
    sizes = [1]
    while sizes[-1] * 4 < rows:
        sizes.append(sizes[-1] * 4)
    return [*sizes, rows] if rows > sizes[-1] else sizes


def _snapshot(generation: Generation, state: State) -> Snapshot:
    """Where a text stands: all but the last token has been read."""
    recent = generation.recent()
    return Snapshot(state, recent[-1:], generation.position, recent[:-1])


def _absent_mask(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor | None:
    """0 for ids that may be drawn, -inf for those the vocabulary does not have; None where it has all."""
    absent = tokenizer.absent(vocab_size)
    if not absent:
        return None
    mask = torch.zeros(vocab_size, device=device)
    mask[absent] = -torch.inf
    return mask

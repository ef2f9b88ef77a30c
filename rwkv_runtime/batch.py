"""The rows of a batch: buffers that never move, and the decode step over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, Forward, Outcome, Tick
from rwkv_runtime.controls import Controls
from rwkv_runtime.errors import BackendError, RwkvError
from rwkv_runtime.model import Model
from rwkv_runtime.observation import BatchObservation, observe
from rwkv_runtime.sampler import Sampler
from rwkv_runtime.tokenizer import Tokenizer

logger = logging.getLogger("rwkv_runtime")


class Batch:
    """`rows` rows and the decode step of their first few, prepared for some sizes.

    `forward` is the backend's forward pass of this model where there is one already: made anew, it may copy weights.
    Raises BackendError where the backend cannot prepare its forward pass or its decode step, and
    torch.OutOfMemoryError where the GPU has no room for so many rows.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        sampler: Sampler,
        tokenizer: Tokenizer,
        rows: int,
        forward: Forward | None = None,
    ) -> None:
        self.model, self.backend, self.sampler, self.tokenizer = model, backend, sampler, tokenizer
        self.rows = rows
        V, device = model.config.vocab_size, model.device
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.logits = torch.zeros((rows, V), dtype=torch.float32, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        sampling_device = torch.device("cpu") if sampler.runs == "host" else device
        self.controls = Controls.allocate(sampler, rows, V, sampling_device, tokenizer)
        self.before = torch.zeros_like(self.controls.position)
        self.absent = _absent_mask(tokenizer, V, device)
        with _backends_own(torch.OutOfMemoryError):  # another backend's state would not be smaller
            self.state = backend.new_state(model, rows)
        with _backends_own():
            self.forward = forward or backend.forward(model)
            with torch.inference_mode():
                self._ticks = {size: self._build_tick(size) for size in _sizes(rows)}

    def move(self, source: int, row: int) -> None:
        """Puts what one row holds into another."""
        self.state.copy(self.state, source, row)
        self.tokens[row].copy_(self.tokens[source])
        self.controls.move(source, row)

    def watched_tick(self, size: int) -> BatchObservation:
        """A step in the open, nothing frozen, and the candidates that its sampler saw."""
        seen: list[BatchObservation] = []
        self._think(size)()
        self._draw(size, lambda z: seen.append(observe(self.sampler, z, self.controls.view(0, size))))()
        return seen[0]

    def sampling_seconds(self, repeats: int = 20) -> float:
        """Median time of one draw for one row, measured now, apart from the forward pass; for the user's figures."""
        controls, logits = self.controls.view(0, 1).clone(), self.logits[:1].to(self.controls.seed.device)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self.sampler.sample(logits, controls).tolist()
            times.append(time.perf_counter() - begin)
        return sorted(times)[repeats // 2]

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
        """The forward pass of a step: tokens -> logits, -inf for ids that the vocabulary does not have."""
        step, forward, absent = self.backend.step, self.forward, self.absent
        tokens, state, logits = self.tokens[:size], self.state.view(0, size), self.logits[:size]

        def think() -> None:
            step(forward, tokens, state, absent, logits)

        return think

    def _draw(self, size: int, watch: Callable[[Tensor], None] | None = None) -> Tick:
        """The draw of a step: logits -> tokens. `watch` sees the logits that the sampler is given."""
        sampler, settle, logits = self.sampler, self.backend.settle, self.logits[:size]
        controls = self.controls.view(0, size)
        outcome = Outcome(self.drawn[:size], self.tokens[:size], controls.position, self.before[:size])
        earlier = replace(controls, position=outcome.before)

        def draw() -> None:
            sampler.prepare(controls)
            z = logits.to(controls.seed.device)
            if watch is not None:
                watch(z)
            token = settle(sampler.sample(z, controls), z, sampler.refuses, outcome)
            sampler.update(token, z, earlier)

        return draw


def _sizes(rows: int) -> list[int]:
    """Batch sizes the decode step is prepared for, before any text is begun: powers of four, and all rows."""
    sizes = [1]
    while sizes[-1] * 4 < rows:
        sizes.append(sizes[-1] * 4)
    return [*sizes, rows] if rows > sizes[-1] else sizes


@contextmanager
def _backends_own(*others: type[Exception]) -> Iterator[None]:
    """Whatever a backend, or its compiler, raises is that backend's failure, but for errors of these types."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (RwkvError, *others)):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(reason[0]) from error


def _absent_mask(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Tensor | None:
    """0 for ids that may be drawn, -inf for those the vocabulary does not have; None where it has all."""
    absent = tokenizer.absent(vocab_size)
    if not absent:
        return None
    mask = torch.zeros(vocab_size)
    mask[absent] = -torch.inf
    return mask.to(device)

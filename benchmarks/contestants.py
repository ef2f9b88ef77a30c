"""Who is compared, of this runtime: its backends, and two ways to run its layers that others use.

What a contestant is to the benchmarks is said by the protocols here; other programs are in `package` and `llama`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_runtime import Backend, Controls, Forward, Model, Sampler, Tick, chunk_size
from rwkv_runtime.backend import as_chunk
from rwkv_runtime.sampler import check_params

PER_OP, TUNED = "per-op compile", "tuned compile"
TUNING = (PER_OP, TUNED)
"""What takes minutes to begin, whatever is measured."""


class Decoder(Protocol):
    """A batch on its way: `feed` says what each row reads next, `step` reads it; logits [B, V]."""

    def feed(self, tokens: Sequence[int]) -> None: ...
    def step(self) -> Tensor: ...


class Contestant(Protocol):
    """One program that can run the model."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] of the last tokens of B prompts of one length, from a fresh state."""
        ...

    def decoder(self, rows: int) -> Decoder: ...


class Ours:
    """A backend, put together as the engine does."""

    def __init__(self, backend: Backend, model: Model) -> None:
        self.backend, self.model = backend, model
        self.forward = backend.forward(model)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        device, size = self.model.device, chunk_size(self.model.device)
        state = self.model.new_state(len(prompts))
        for start in range(0, len(prompts[0]), size):
            rows = [as_chunk(tokens[start : start + size], device) for tokens in prompts]
            logits = self.forward(rows[0] if len(rows) == 1 else torch.cat(rows), state)
        return logits

    def decoder(self, rows: int, sampler: Sampler | None = None) -> FrozenDecoder:
        return FrozenDecoder(self, rows, sampler)


class FrozenDecoder:
    """One decode step over static buffers, frozen by the backend; with a sampler, a draw for each row is part of it."""

    def __init__(self, ours: Ours, rows: int, sampler: Sampler | None) -> None:
        model, forward = ours.model, ours.forward
        V = model.config.vocab_size
        state = ours.backend.new_state(model, rows)
        tokens = torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
        logits = torch.zeros((rows, V), device=model.device)
        buffers = [*state.tensors.values(), logits]

        def think() -> None:
            logits.copy_(forward(tokens, state))

        tick = think
        if sampler is not None:
            controls = Controls.allocate(sampler, rows, V, model.device)
            draw = draws(sampler, logits, controls)
            buffers += controls.buffers()

            def tick() -> None:
                think()
                draw()

        begin = time.perf_counter()
        with torch.inference_mode():
            self.tick = ours.backend.freeze(tick, buffers)
        self.freeze_seconds = time.perf_counter() - begin
        self.tokens, self.logits = tokens, logits

    def feed(self, tokens: Sequence[int]) -> None:
        self.tokens.copy_(torch.tensor(tokens)[:, None])

    @torch.inference_mode()
    def step(self) -> Tensor:
        self.tick()
        return self.logits


def draws(
    sampler: Sampler, logits: Tensor, controls: Controls, params: Mapping[str, float] | None = None
) -> Callable[[], None]:
    """One draw for every row of logits [B, V], as the engine asks for it; row i has seed i."""
    for row in range(len(logits)):
        controls.set(row, check_params(sampler, params or {}), seed=row, position=0)

    def draw() -> None:
        sampler.update(sampler.sample(logits, controls), logits, controls)
        controls.position.add_(1)

    return draw


class PerOpCompile(Backend):
    """Each op of the architecture through torch.compile on its own, as RWKV programs commonly do it."""

    name = PER_OP

    def __init__(self, usable: Backend, tune: bool = True) -> None:
        """`usable` is asked whether torch.compile works. Tuning takes minutes; without it the ops are only traced,
        which shows that they can be."""
        self.usable = usable
        self.options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if tune else {"backend": "eager"}

    def why_not(self, model: Model | None) -> str | None:
        return self.usable.why_not(model)

    def forward(self, model: Model) -> Forward:
        ops: dict[str, Callable[..., Any]] = {
            name: torch.compile(op, dynamic=False, **self.options) for name, op in model.architecture.ops.items()
        }
        return partial(model.architecture.forward, ops, model.weights)


class TunedCompile(Backend):
    """The whole step through torch.compile, products of one row as reductions, each kernel tuned by trying."""

    name = TUNED

    def __init__(self, untuned: Backend) -> None:
        self.untuned = untuned

    def why_not(self, model: Model | None) -> str | None:
        if model is not None and model.device.type != "cuda":
            return "only kernels of a GPU are tuned"
        return self.untuned.why_not(model)

    def forward(self, model: Model) -> Forward:
        return self.untuned.forward(model)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        import torch._inductor.config as settings

        with settings.patch(coordinate_descent_tuning=True):  # compiles, and tunes, before it returns
            return self.untuned.freeze(tick, buffers)

"""Who is compared: this runtime's backends, the `rwkv` package, and every op compiled by itself."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.checkpoints import Checkpoint
from rwkv_runtime import Backend, Forward, Model, State
from rwkv_runtime.engine import CHUNK

PACKAGE = "rwkv package"
PER_OP = "per-op compile"
STRATEGIES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Decoder(Protocol):
    """A batch on its way: `feed` says what each row reads next, `step` reads it; logits [B, V]."""

    def feed(self, tokens: Sequence[int]) -> None: ...
    def step(self) -> Tensor: ...


class Contestant(Protocol):
    """One program that can run the model."""

    name: str

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] of the last token of a prompt, from a fresh state."""
        ...

    def decoder(self, rows: int) -> Decoder: ...


class Ours:
    """A backend, put together as the engine does."""

    def __init__(self, backend: Backend, model: Model) -> None:
        self.name = backend.name
        self.backend, self.model = backend, model
        self.forward = backend.forward(model)

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        state = self.model.new_state()
        for start in range(0, len(tokens), CHUNK):
            logits = self.forward(torch.tensor([tokens[start : start + CHUNK]], device=self.model.device), state)
        return logits[0]

    def decoder(self, rows: int) -> FrozenDecoder:
        return FrozenDecoder(self, rows)


class FrozenDecoder:
    """One decode step over static buffers, frozen by the backend."""

    def __init__(self, ours: Ours, rows: int) -> None:
        model, forward = ours.model, ours.forward
        state: State = model.new_state(rows)
        tokens = torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
        logits = torch.zeros((rows, model.config.vocab_size), device=model.device)

        def think() -> None:
            logits.copy_(forward(tokens, state))

        begin = time.perf_counter()
        self.tick = ours.backend.freeze(think, [*state.tensors.values(), logits])
        self.freeze_seconds = time.perf_counter() - begin
        self.tokens, self.logits = tokens, logits

    def feed(self, tokens: Sequence[int]) -> None:
        self.tokens.copy_(torch.tensor(tokens)[:, None])

    def step(self) -> Tensor:
        self.tick()
        return self.logits


class PerOpCompile(Backend):
    """Each op of the architecture through torch.compile on its own, as RWKV programs commonly do it."""

    name = PER_OP

    def __init__(self, tune: bool = True) -> None:
        """Tuning takes minutes; without it the ops are only traced, which shows that they can be."""
        self.options: dict[str, Any] = {"mode": "max-autotune"} if tune else {"backend": "eager"}

    def forward(self, model: Model) -> Forward:
        ops: dict[str, Callable[..., Any]] = {
            name: torch.compile(op, dynamic=False, **self.options) for name, op in model.architecture.ops.items()
        }
        return partial(model.architecture.forward, ops, model.weights)


class Package:
    """The `rwkv` package. It has no batches for RWKV-6: several rows are read one after another."""

    name = PACKAGE

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every tensor it loads
            from rwkv.model import RWKV

            self.model = RWKV(str(checkpoint.pth.with_suffix("")), f"{device} {STRATEGIES[checkpoint.dtype]}")

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        logits: Tensor = self.model.forward(list(tokens), None)[0]
        return logits

    def decoder(self, rows: int) -> PackageDecoder:
        return PackageDecoder(self.model, rows)


class PackageDecoder:
    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.states: list[Any] = [None] * rows
        self.tokens: Sequence[int] = [0] * rows

    def feed(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def step(self) -> Tensor:
        rows = []
        for row, token in enumerate(self.tokens):
            logits, self.states[row] = self.model.forward([token], self.states[row])
            rows.append(logits)
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def import_package() -> None:
    """Importing it sets flags of torch for the whole process.

    Done before anything is compiled: torch.compile would compile anew when a flag changes.
    """
    if why_no_package() is None:
        os.environ.setdefault("RWKV_JIT_ON", "1")  # both are read when the package is imported
        os.environ.setdefault("RWKV_CUDA_ON", "0")
        import_module("rwkv.model")


def why_no_package() -> str | None:
    """None where the `rwkv` package is installed."""
    return None if find_spec("rwkv") else "the rwkv package is not installed"

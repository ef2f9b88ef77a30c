"""Triton kernels and one CUDA graph: a decode step in about seven kernels a layer, prompts through fused chunks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from rwkv_backends.deferred import DeferredState
from rwkv_backends.graphs import Graphs
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.prompts import CapturedPrompts, Padded, size_of
from rwkv_runtime import (
    Backend,
    Forward,
    Model,
    ModelConfig,
    Outcome,
    State,
    Tick,
    chunk_size,
    hookimpl,
)

FAMILIES = {name: f"rwkv_backends.kernels.{name}" for name in ("rwkv6", "rwkv7")}
"""The modules that have `forward(model, tuning)` for the architecture of that name."""
HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = 2
"""The first may differ from all others, and the last in what comes after it."""
LOGITS = 3
"""Of a row, as float32: the engine's, those of the head, and what a sampler makes of them."""
CAPABILITY = (8, 0)
"""What the kernels need of a GPU: bfloat16."""
logger = logging.getLogger("rwkv_runtime")


class Fused(Backend):
    name = "fused"
    summary = "kernels of our own, a decode step as one CUDA graph; needs a GPU and Triton"
    priority = 40

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        self._graphs = Graphs()

    def why_not(self, model: Model | None) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed"
        device = model.device if model else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type != "cuda":
            if not interpreted():
                return "it needs a CUDA device"
        elif interpreted():
            return "Triton's interpreter is on (TRITON_INTERPRET), which is for the CPU"
        elif torch.cuda.get_device_capability(device) < CAPABILITY:
            return f"it needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later"
        if model is None:
            return None
        if model.architecture.name not in FAMILIES:
            return f"it has no kernels for {model.architecture.name}"
        if model.config.head_size not in HEAD_SIZES:
            return f"its heads are of {model.config.head_size}; there are kernels for {', '.join(map(str, HEAD_SIZES))}"
        if model.dtype not in DTYPES:
            return f"there are no kernels for {str(model.dtype).removeprefix('torch.')}"
        if model.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None

    def warm_up(self, device: torch.device, blank: Callable[[], Model]) -> None:
        """Triton and cuBLAS begin while the file is opened and kernels are imported. Then these are loaded, one after
        another."""
        if device.type == "cuda":
            with ThreadPoolExecutor(2) as beside:
                begun = [beside.submit(begin, device) for begin in (_begin_triton, _begin_cublas)]
                model = blank()
                if model.architecture.name not in FAMILIES:
                    return
                import_module(FAMILIES[model.architecture.name])
            self._begin(model)
            for one in begun:
                one.result()

    def forward(self, model: Model) -> Forward:
        forward = self._family(model)
        if model.device.type == "cuda":
            # Compiles now, so that a failure shows here; decode steps are compiled by `freeze`.
            self._begin(beginning(model))
            return CapturedPrompts(forward, model, self._graphs, *self._prompts(model))
        return forward

    def _family(self, model: Model) -> Padded:
        family: Callable[[Model, Tuning], Padded] = import_module(FAMILIES[model.architecture.name]).forward
        return family(model, self.tuning if overlaps(model.device) else replace(self.tuning, overlap=False))

    def _prompts(self, model: Model) -> tuple[set[int], int]:
        """Lengths that have a graph each, and the one up to which prompts are filled up."""
        whole = {chunk_size(model.device, waited_for) for waited_for in (False, True)}
        return whole, min(*whole, self.tuning.padded // multiplications(model.config))

    def _begin(self, model: Model) -> None:
        """Starts every variant of the kernels that prompts and the ends of draws may need."""
        short, lengths, (_, padded) = self._family(model), self.tuning.prompts, self._prompts(model)
        for length, filled in {(n, n < padded) for n in lengths} | {(lengths[-1], False)}:
            tokens = torch.zeros(1, size_of(length) if filled else length, dtype=torch.int64, device=model.device)
            logits = short(tokens, model.new_state(), length=tokens.new_full((1,), length) if filled else None)
        self._settle(logits.float())  # as an engine keeps them

    def _settle(self, logits: Tensor) -> None:
        """Both ends of a draw, from the first row of logits [B, V]: not every sampler is part of what is frozen."""
        drawn, *others = (torch.zeros(1, dtype=torch.int64, device=logits.device) for _ in range(4))
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            for refused in (False, True):
                self.settle(drawn, logits[:1], refused, Outcome(drawn, *others))

    def new_state(self, model: Model, rows: int) -> State:
        tuning = self.tuning
        if model.architecture.name != "rwkv6" or not tuning.deferred or rows <= tuning.deferred_rows:
            return super().new_state(model, rows)
        try:
            deferred = DeferredState.of(model, rows, tuning.deferred) if self._room(model, rows) else None
        except torch.OutOfMemoryError:  # less is free than it seemed
            deferred = None
        if deferred is None:
            logger.warning(f"no memory is left for what makes steps of {rows} rows faster")
        return deferred or super().new_state(model, rows)

    def _room(self, model: Model, rows: int) -> bool:
        """Whether these rows fit twice, for `freeze` copies what it captures, and their logits a few times."""
        row = DeferredState.of(model, 1, self.tuning.deferred).nbytes + LOGITS * 4 * model.config.vocab_size
        return 2 * rows * row <= free_bytes(model.device)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        return self._graphs.capture(tick, buffers) if buffers[0].is_cuda else tick

    def step(self, forward: Forward, tokens: Tensor, state: State, absent: Tensor | None, logits: Tensor) -> None:
        narrow: Forward | None = getattr(forward, "narrow", None)
        if narrow is None:
            super().step(forward, tokens, state, absent, logits)
        else:
            from rwkv_backends.kernels import widen

            widen.widen(narrow(tokens, state), absent, logits)

    def settle(self, token: Tensor, logits: Tensor, refused: bool, outcome: Outcome) -> Tensor:
        ours = (outcome.drawn.is_cuda and token.is_cuda) or interpreted()
        if not ours or token.dtype != torch.int64 or token.shape != outcome.drawn.shape:
            return super().settle(token, logits, refused, outcome)  # a sampler on the host, or one to be complained of
        from rwkv_backends.kernels import settle

        return settle.settle(token, logits, refused, outcome)


def beginning(model: Model) -> Model:
    """The model with its first layers alone, which between them start every kernel that the others do."""
    return replace(model, weights=model.weights._replace(blocks=model.weights.blocks[:LAYERS]))


def multiplications(config: ModelConfig) -> int:
    """Of a token with a layer's large matrices."""
    C = config.n_embd
    return 6 * C * C + 2 * C * config.n_ffn


def free_bytes(device: torch.device) -> int:
    """What could be allocated: what the device has free, and PyTorch keeps and does not use."""
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _begin_triton(device: torch.device) -> None:
    """What it does before its first kernel, and keeps: a hash of its 400 MB, a driver, and its assembler's version."""
    from triton.compiler import make_backend
    from triton.runtime import cache, driver

    key = getattr(cache, "triton_key", None)  # other versions have it elsewhere
    if key is not None:
        key()
    with torch.cuda.device(device):
        make_backend(driver.active.get_current_target()).hash()


def _begin_cublas(device: torch.device) -> None:
    """It loads what it multiplies 16 bits with at the first product of a kind."""
    square = torch.zeros(1, 1024, 1024, dtype=torch.bfloat16, device=device)
    torch.bmm(square, square)[0].addmm_(square[0], square[0])


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one operation at a time: for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@hookimpl
def rwkv_backends() -> list[Backend]:
    return [Fused()]

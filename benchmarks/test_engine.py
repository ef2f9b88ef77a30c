"""What the engine adds to the forward pass, with the embedded model, where it weighs most; and what grows with a text.

The model is tiny: a step takes a fraction of a millisecond, so that any time outside the forward pass shows.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.arena import Arena, Lineup
from benchmarks.ceilings import synchronize
from benchmarks.contestants import Ours
from benchmarks.room import Unavailable
from benchmarks.test_forward import of_model
from benchmarks.timing import Timing, race, record
from rwkv_runtime import Backend, Forward, Model, Outcome, State, Tick
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Finish, Generation, Request
from rwkv_runtime.runtime import why_not
from rwkv_runtime.sampler import check_params
from rwkv_runtime.tokenizer import Tokenizer
from rwkv_runtime.vocabulary import find_vocabulary, load_vocabulary

SAMPLER = "nucleus"
SHORT, LONG, WRITTEN = 100, 10_000, 2_000
"""Tokens read before a step is timed, and those written while memory is watched."""
PROFILED = 12
"""Functions in the profile."""


class Watched(Backend):
    """A backend whose frozen steps, forward pass and sampling, can be timed until the device is done with them."""

    name = "watched"

    def __init__(self, inner: Backend, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.watching = False  # a GPU that is waited for does not go on while the host reads
        self.seconds = 0.0
        self.profile: cProfile.Profile | None = None

    def forward(self, model: Model) -> Forward:
        return self.inner.forward(model)

    def step(self, forward: Forward, tokens: Tensor, state: State, absent: Tensor | None, logits: Tensor) -> None:
        self.inner.step(forward, tokens, state, absent, logits)

    def settle(self, token: Tensor, logits: Tensor, refused: bool, outcome: Outcome) -> Tensor:
        return self.inner.settle(token, logits, refused, outcome)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        self.bare = frozen = self.inner.freeze(tick, buffers)

        def step() -> None:
            if not self.watching:
                return frozen()
            if self.profile:
                self.profile.disable()
            begin = time.perf_counter()
            frozen()
            synchronize(self.device)
            self.seconds += time.perf_counter() - begin
            if self.profile:
                self.profile.enable()
            return None

        return step


@pytest.fixture(scope="session")
def story(arena: Arena) -> tuple[Model, Tokenizer]:
    path = embedded_model()
    model = build_model(open_tensors(path), arena.plugins.architectures, arena.settings.device)
    V = model.config.vocab_size
    return model, load_vocabulary(find_vocabulary(path, None, V), V)


class Endless(Generation):
    """A text that goes on after its end, so that no prompt of another comes among the steps that are timed."""

    def accept(self, token: int) -> Finish | None:
        finish = super().accept(token)
        return None if finish == "end" else finish


class Writer:
    """Steps of an engine of one row, after a prompt of `length` tokens. Raises Unavailable."""

    def __init__(self, arena: Arena, story: tuple[Model, Tokenizer], backend: str, length: int) -> None:
        model, tokenizer = story
        self.backend = Watched(arena.plugins.backends.get(backend), arena.settings.device)
        if reason := why_not(self.backend.inner, model):
            raise Unavailable(reason)
        self.engine = Engine(model, self.backend, arena.plugins.sampler(SAMPLER), tokenizer)
        text = tokenizer.encode("Once upon a time there was a little girl. " * (1 + length // 8))
        request = Request(text[:length], max_tokens=1 << 30, seed=1)
        self.generation = Endless(request, check_params(self.engine.sampler, {}), tokenizer)
        self.engine.enqueue(self.generation)
        while not self.generation.tokens:
            self.step()

    def step(self) -> None:
        self.engine.step()
        self.generation.pieces.clear()

    def watched(self, count: int, profile: cProfile.Profile | None = None) -> float:
        """Seconds of a step's time outside forward pass and sampling, the device being waited for."""
        self.backend.watching, self.backend.seconds, self.backend.profile = True, 0.0, profile
        begin = time.perf_counter()
        if profile:
            profile.enable()
        for _ in range(count):
            self.step()
        if profile:
            profile.disable()
        self.backend.watching = False
        return (time.perf_counter() - begin - self.backend.seconds) / count


def test_overhead(benchmark: BenchmarkFixture, arena: Arena, story: tuple[Model, Tokenizer], backend: str) -> None:
    """How much longer a token takes than its step alone; what the host does for it, and where that time goes.

    A GPU works on the next step while the host does that: it costs time only as far as it is longer than the step.
    """
    count = 5 if arena.settings.smoke else 200
    benchmark.group = "8 engine, embedded model"
    writer = Writer(arena, story, backend, length=8)
    rival = writer.backend.bare if writer.engine.lag else None
    with torch.inference_mode():  # as in a step of the engine
        timing = race(benchmark, arena, writer.step, rival, count=count, rounds=10)
    host = writer.watched(count)
    bare = timing.p50 - host if timing.ratio is None else timing.p50 * timing.ratio
    times = {"share_outside": 1 - bare / timing.p50, "host_us": host * 1e6, "bare_us": bare * 1e6}
    rows = profile(writer, count)
    record(
        benchmark, arena, "overhead", backend, alone(timing), **times, tokens_per_second=1 / timing.p50, profile=rows
    )


def profile(writer: Writer, count: int) -> list[tuple[str, float, float]]:
    """Where the time outside goes: function, calls a step, own microseconds a step, with the profiler's own time."""
    profile = cProfile.Profile()
    writer.watched(count, profile)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        (f"{Path(file).name}:{line} {name}" if line else name, calls / count, own / count * 1e6)
        for (file, line, name), (_, calls, own, _, _) in stats.items()
        if "Profiler" not in name
    ]
    return sorted(rows, key=lambda row: -row[2])[:PROFILED]


def test_growth(benchmark: BenchmarkFixture, arena: Arena, story: tuple[Model, Tokenizer], backend: str) -> None:
    """A step after a long context against one after a short one; and memory after as many tokens written."""
    count, long = (5, 600) if arena.settings.smoke else (100, LONG)
    benchmark.group = f"9 growth, embedded model (steps after {long:,} tokens)"
    short_writer, writer = (Writer(arena, story, backend, length) for length in (SHORT, long))
    timing = race(benchmark, arena, writer.step, short_writer.step, count=count, rounds=10)
    assert timing.ratio is not None
    gc.collect()
    before = memory(arena.settings.device)
    written = 20 if arena.settings.smoke else WRITTEN
    for _ in range(written):
        writer.step()
    gc.collect()
    grown = memory(arena.settings.device) - before
    figures = {"context": long, "growth": 1 / timing.ratio, "grown_mb": grown / 1e6, "written": written}
    record(benchmark, arena, "growth", backend, alone(timing), **figures, state_mb=writer.engine.state.nbytes / 1e6)


def memory(device: torch.device) -> int:
    """Bytes in use: of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        raise Unavailable("this system does not say how much memory a process uses")
    return int(statm.read_text().split()[1]) * 4096


def test_sampling_share(benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, backend: str) -> None:
    """A frozen step with the sampler in it against the same without: what sampling costs of a step."""
    model = of_model(lineup)
    benchmark.group = f"4 sampling in a step, {' '.join(model.values())}, {SAMPLER}"
    chosen = arena.plugins.sampler(SAMPLER)
    assert chosen.runs == "graph"
    bare = lineup.decoder(backend, 1)
    ours = lineup.contestant(backend)
    assert isinstance(ours, Ours)
    whole = ours.decoder(1, chosen)
    timing = race(benchmark, arena, whole.step, bare.step, count=2 if arena.settings.smoke else 16, rounds=8)
    assert timing.ratio is not None
    figures = {"batch": 1, "tokens_per_second": 1 / timing.p50, "sampling_share": 1 - timing.ratio}
    record(benchmark, arena, "sampling share", backend, alone(timing), **model, **figures)


def alone(timing: Timing) -> Timing:
    """Without the ratio, which was to a step of our own."""
    return replace(timing, ratio=None)

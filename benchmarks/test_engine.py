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
from rwkv_runtime import Backend, Forward, Model, Outcome, Runtime, Tick
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.runtime import find_vocabulary, why_not
from rwkv_runtime.tokenizer import Tokenizer

SAMPLER = "nucleus"
SHORT, LONG, WRITTEN = 100, 10_000, 2_000
"""Tokens read before a step is timed, and those written while memory is watched."""
PROFILED = 12
"""Functions in the profile."""


class Watched(Backend):
    """A backend whose frozen steps are timed: forward pass and sampling, until the device is done with them."""

    name = "watched"

    def __init__(self, inner: Backend, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.seconds = 0.0
        self.profile: cProfile.Profile | None = None

    def forward(self, model: Model) -> Forward:
        return self.inner.forward(model)

    def settle(self, token: Tensor, logits: Tensor, refused: bool, outcome: Outcome) -> Tensor:
        return self.inner.settle(token, logits, refused, outcome)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        frozen = self.inner.freeze(tick, buffers)

        def step() -> None:
            if self.profile:
                self.profile.disable()
            begin = time.perf_counter()
            frozen()
            synchronize(self.device)
            self.seconds += time.perf_counter() - begin
            if self.profile:
                self.profile.enable()

        return step


@pytest.fixture(scope="session")
def story(arena: Arena) -> tuple[Model, Tokenizer]:
    path = embedded_model()
    model = build_model(open_tensors(path), arena.plugins.architectures, arena.settings.device)
    return model, find_vocabulary(path, None, model.config.vocab_size)


def make_engine(arena: Arena, story: tuple[Model, Tokenizer], backend: str) -> tuple[Engine, Watched]:
    """An engine of one row, and its backend. Raises Unavailable."""
    model, tokenizer = story
    watched = Watched(arena.plugins.backends.get(backend), arena.settings.device)
    if reason := why_not(watched.inner, model):
        raise Unavailable(reason)
    return Engine(model, watched, arena.plugins.sampler(SAMPLER), tokenizer), watched


class Writer:
    """Steps of an engine that never runs out of text: one that ends is followed by the next."""

    def __init__(self, engine: Engine, runtime: Runtime, length: int) -> None:
        self.engine, self.runtime, self.length, self.seed = engine, runtime, length, 0
        self.begin()

    def begin(self) -> None:
        """Submits a text and writes its first token, so that its prompt has been read."""
        text = self.runtime.tokenizer.encode("Once upon a time there was a little girl. " * (1 + self.length // 8))
        self.seed += 1
        request = self.runtime.request(text[: self.length], max_tokens=1 << 30, seed=self.seed)
        self.generation = self.engine.submit(request)
        while not self.generation.tokens:
            self.engine.step()

    def step(self) -> None:
        if self.generation.finish:
            self.begin()
        self.engine.step()
        self.generation.pieces.clear()


def make_writer(arena: Arena, story: tuple[Model, Tokenizer], backend: str, length: int) -> tuple[Writer, Watched]:
    engine, watched = make_engine(arena, story, backend)
    return Writer(engine, Runtime(*story, arena.plugins, backend), length), watched


def test_overhead(benchmark: BenchmarkFixture, arena: Arena, story: tuple[Model, Tokenizer], backend: str) -> None:
    """The share of a step outside forward pass and sampling, and where that goes."""
    count = 5 if arena.settings.smoke else 200
    benchmark.group = "8 engine, embedded model"
    writer, watched = make_writer(arena, story, backend, length=8)
    timing = race(benchmark, arena, writer.step, count=count, rounds=10)
    watched.seconds, begin = 0.0, time.perf_counter()
    for _ in range(count):
        writer.step()
    share = 1 - watched.seconds / (time.perf_counter() - begin)
    rows = profile(writer, watched, count)
    figures = {"tokens_per_second": 1 / timing.p50, "share_outside": share, "profile": rows}
    record(benchmark, arena, "overhead", backend, timing, **figures)


def profile(writer: Writer, watched: Watched, count: int) -> list[tuple[str, float, float]]:
    """Where the time outside goes: function, calls a step, own microseconds a step, with the profiler's own time."""
    watched.profile = profile = cProfile.Profile()
    profile.enable()
    for _ in range(count):
        writer.step()
    profile.disable()
    watched.profile = None
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
    short_writer, _ = make_writer(arena, story, backend, SHORT)
    writer, _ = make_writer(arena, story, backend, long)
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

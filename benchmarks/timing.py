"""Timing: rounds of many steps ended by one synchronisation, each beside a round of the rival."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.ceilings import cache_bytes, clock, synchronize
from benchmarks.package import PACKAGE

Run = Callable[[], object]
ROUND_SECONDS, CASE_SECONDS = 1.0, 5.0
"""About as long as a round and a case may take: a slow one gets fewer rounds, three at least."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, from all rounds; and how many times as long the rival took, in paired rounds."""

    p50: float
    p99: float
    ratio: float | None


class Steps:
    """One round: `count` steps. On a CPU each is timed; on a GPU only the round, for timing one would stop it."""

    def __init__(self, step: Run, count: int, device: torch.device) -> None:
        self.step, self.count, self.device = step, count, device
        self.laps: list[float] = []

    def __call__(self) -> None:
        begin = previous = time.perf_counter()
        for _ in range(self.count):
            self.step()
            if self.device.type == "cpu":
                now = time.perf_counter()
                self.laps.append(now - previous)
                previous = now
        if self.device.type != "cpu":
            synchronize(self.device)
            self.laps.append((time.perf_counter() - begin) / self.count)


def race(
    benchmark: BenchmarkFixture,
    arena: Arena,
    step: Run,
    rival: Run | None = None,
    *,
    count: int = 1,
    rounds: int = 10,
) -> Timing:
    """Times a step. A round of the rival goes before each round, so that a slow moment of the machine hits both.

    A round is at most `count` steps: fewer where a step is slow.
    """
    device, rounds = arena.settings.device, arena.settings.rounds(rounds)
    rivals = [] if rival is None else [rival]
    gc.collect()
    gc.freeze()  # collections need not walk over what the other contestants hold
    try:
        if not arena.settings.smoke:
            count, rounds = _plan([step, *rivals], count, rounds, device)
        own, others = Steps(step, count, device), [Steps(run, count, device) for run in rivals]
        own_rounds: list[float] = []
        rival_rounds: list[float] = []
        benchmark.pedantic(
            lambda: own_rounds.append(clock(own, device)),
            setup=lambda: rival_rounds.extend(clock(other, device) for other in others),
            rounds=rounds,
        )
    finally:
        gc.unfreeze()
    laps = sorted(own.laps)
    pairs = zip(own_rounds, rival_rounds, strict=False)
    ratio = statistics.median(theirs / ours for ours, theirs in pairs) if rivals else None
    return Timing(laps[len(laps) // 2], laps[min(len(laps) - 1, int(len(laps) * 0.99))], ratio)


def _plan(runs: Sequence[Run], count: int, rounds: int, device: torch.device) -> tuple[int, int]:
    """Steps a round and rounds that take about as long as they may; warms up on the way."""
    for run in runs:
        run()
    single = sum(clock(run, device) for run in runs)
    count = max(1, min(count, int(ROUND_SECONDS / single)))
    for run in runs:
        Steps(run, count, device)()
    return count, max(3, min(rounds, int(CASE_SECONDS / (count * single))))


def record(
    benchmark: BenchmarkFixture, arena: Arena, case: str, contestant: str, timing: Timing, **figures: Any
) -> None:
    """Stores a result with pytest-benchmark, in the file of results and for the summary. What is above a ceiling is
    marked."""
    ratio = 1.0 if contestant == PACKAGE else timing.ratio
    figures = {
        "case": case,
        "contestant": contestant,
        "device": str(arena.settings.device),
        "ms_p50": timing.p50 * 1e3,
        "ms_p99": timing.p99 * 1e3,
        "ratio_to_package": ratio,
        "smoke": arena.settings.smoke,
        **figures,
    }
    shares = [figures[name] for name in ("read_share", "matmul_share") if name in figures]
    if shares and max(shares) > 1:
        figures["flag"] = f"{max(shares):.0%} of the ceiling: impossible, or the weights stay in the cache"
        read, cache = figures.get("bytes_per_step", 0), cache_bytes()
        if arena.settings.device.type == "cpu" and read and cache:
            figures["flag"] += f" (a step reads {read / 1e9:.2f} GB, the cache holds {cache / 1e9:.2f} GB)"
    keep(benchmark, arena, figures)


def keep(benchmark: BenchmarkFixture, arena: Arena, figures: dict[str, Any]) -> None:
    benchmark.extra_info.update(figures)
    arena.keep({"group": benchmark.group, **figures})

"""Timing: rounds of many steps ended by one synchronisation, each beside a round of the rival."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.ceilings import cache_bytes, clock, synchronize
from benchmarks.contestants import PACKAGE

Run = Callable[[], object]


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
    warmup: int = 2,
) -> Timing:
    """Times a step. A round of the rival goes before each round, so that a slow moment of the machine hits both."""
    device, rounds = arena.settings.device, arena.settings.rounds(rounds)
    own, other = Steps(step, count, device), Steps(rival or step, count, device)
    own_rounds: list[float] = []
    rival_rounds: list[float] = []

    def timed() -> None:
        own_rounds.append(clock(own, device))

    def before() -> None:
        if rival is not None:
            rival_rounds.append(clock(other, device))

    gc.collect()
    gc.freeze()  # collections need not walk over what the other contestants hold
    try:
        benchmark.pedantic(timed, setup=before, rounds=rounds, warmup_rounds=0 if arena.settings.smoke else warmup)
    finally:
        gc.unfreeze()
    laps = sorted(own.laps[-rounds * (len(own.laps) // len(own_rounds)) :])
    pairs = zip(own_rounds[-rounds:], rival_rounds[-rounds:], strict=False)
    ratio = statistics.median(theirs / ours for ours, theirs in pairs) if rival else None
    return Timing(laps[len(laps) // 2], laps[min(len(laps) - 1, int(len(laps) * 0.99))], ratio)


def record(
    benchmark: BenchmarkFixture, arena: Arena, case: str, contestant: str, timing: Timing, **figures: Any
) -> None:
    """Stores a result with pytest-benchmark and for the summary. What is above a ceiling is marked."""
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
    benchmark.extra_info.update(figures)
    arena.records.append({"group": benchmark.group, **figures})

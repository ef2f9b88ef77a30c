"""What the machine can do at best."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.ceilings import clock
from benchmarks.timing import keep


def test_ceiling(benchmark: BenchmarkFixture, arena: Arena, probe: str) -> None:
    benchmark.group = "0 ceilings"
    chosen = arena.ceilings.probe(probe)

    def run() -> None:
        arena.ceilings.record(probe, chosen, clock(chosen.run, arena.settings.device))

    benchmark.pedantic(run, rounds=arena.settings.rounds(7), warmup_rounds=1)
    figures = {"rate": arena.ceilings.best[probe], "unit": chosen.unit, "device": str(arena.settings.device)}
    keep(benchmark, arena, {"case": "ceiling", "contestant": probe, **figures, "smoke": arena.settings.smoke})

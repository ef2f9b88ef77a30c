"""What the machine can do at best."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.ceilings import clock


def test_ceiling(benchmark: BenchmarkFixture, arena: Arena, probe: str) -> None:
    benchmark.group = "0 ceilings"
    chosen = arena.ceilings.probe(probe)

    def run() -> None:
        arena.ceilings.record(probe, chosen, clock(chosen.run, arena.settings.device))

    benchmark.pedantic(run, rounds=arena.settings.rounds(7), warmup_rounds=1)
    benchmark.extra_info.update(
        case="ceiling", contestant=probe, rate=arena.ceilings.best[probe], unit=chosen.unit, smoke=arena.settings.smoke
    )

"""Choosing a token from the logits of RWKV World's vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.arena import Arena
from benchmarks.checkpoints import VOCAB_SIZE
from benchmarks.contestants import draws
from benchmarks.package import PACKAGE, why_no_package
from benchmarks.timing import race, record
from rwkv_runtime import Controls

FULL = {"temperature": 0.9, "top_p": 0.7, "top_k": 50}


def make_logits(batch: int, device: torch.device) -> Tensor:
    """A few likely tokens and a long tail, as trained models give."""
    noise = torch.randn((batch, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    return (3 * noise).to(device)


def our_step(arena: Arena, sampler: str, batch: int, params: dict[str, float]) -> Callable[[], object]:
    """One draw for every row, as the engine asks for it."""
    chosen = arena.plugins.sampler(sampler)
    device = torch.device("cpu") if chosen.runs == "host" else arena.settings.device
    controls, logits = Controls.allocate(chosen, batch, VOCAB_SIZE, device), make_logits(batch, device)
    return draws(chosen, logits, controls, params)


def package_step(arena: Arena, batch: int, params: dict[str, float]) -> Callable[[], object] | None:
    """The same choice by the `rwkv` package, which takes rows one by one; None where it is not installed."""
    if why_no_package():
        return None
    from rwkv.utils import PIPELINE

    rows = list(make_logits(batch, arena.settings.device))
    params = {"temperature": 1.0, "top_p": 0.8, "top_k": 0} | params
    return lambda: [PIPELINE.sample_logits(None, row, **params) for row in rows]


def test_sampling(benchmark: BenchmarkFixture, arena: Arena, sampler: str, batch: int) -> None:
    rival = package_step(arena, batch, {}) if sampler == "nucleus" else None
    compare(benchmark, arena, sampler, our_step(arena, sampler, batch, {}), rival, batch)


def test_nucleus_with_all_parameters(benchmark: BenchmarkFixture, arena: Arena, batch: int) -> None:
    name = "nucleus, top-k and temperature on"
    rival = package_step(arena, batch, FULL)
    compare(benchmark, arena, name, our_step(arena, "nucleus", batch, FULL), rival, batch)


def test_package(benchmark: BenchmarkFixture, arena: Arena, batch: int) -> None:
    step = package_step(arena, batch, {})
    if step is None:
        pytest.skip(str(why_no_package()))
    compare(benchmark, arena, PACKAGE, step, None, batch)


def compare(
    benchmark: BenchmarkFixture,
    arena: Arena,
    name: str,
    step: Callable[[], object],
    rival: Callable[[], object] | None,
    batch: int,
) -> None:
    benchmark.group = f"4 sampling batch {batch}"
    timing = race(benchmark, arena, step, rival, count=20, rounds=10)
    record(benchmark, arena, "sampling", name, timing, batch=batch, tokens_per_second=batch / timing.p50)

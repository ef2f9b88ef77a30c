"""Reading a prompt, writing tokens, and both with sampling, on the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena, Lineup, Unavailable, prompt
from benchmarks.contestants import PACKAGE, PER_OP, Package
from benchmarks.timing import Timing, race, record
from rwkv_runtime import Runtime
from rwkv_runtime.tokenizer import load_tokenizer, world_vocabulary

Make = Callable[[str], Callable[[], object]]
"""Name of a contestant -> its step, ready and checked. Raises Unavailable."""


def race_package(benchmark: BenchmarkFixture, arena: Arena, make: Make, name: str, count: int, rounds: int) -> Timing:
    """A contestant against the `rwkv` package where that is there; skips one that cannot take part."""
    try:
        step = make(name)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    try:
        rival = None if name == PACKAGE else make(PACKAGE)
    except Unavailable:
        rival = None
    return race(benchmark, arena, step, rival, count=count, rounds=rounds)


def test_decode(benchmark: BenchmarkFixture, arena: Arena, size: str, dtype: str, batch: int, contestant: str) -> None:
    if contestant == PER_OP and batch > 1:
        pytest.skip(f"{PER_OP}: compared for one row only")
    count = 2 if arena.settings.smoke else max(1, 16 // batch)  # rows cost the package time, one by one
    benchmark.group = f"1 decode {size} {dtype} batch {batch} ({count} steps a round)"
    lineup = arena.lineup(size, dtype)

    def make(name: str) -> Callable[[], object]:
        decoder = lineup.decoder(name, batch)
        decoder.feed(prompt(batch))
        return decoder.step

    timing = race_package(benchmark, arena, make, contestant, count, rounds=8)
    # The package reads the weights once a row; what counts is what a step has to read.
    read = lineup.checkpoint.matrix_bytes
    figures = {
        "size": size,
        "dtype": dtype,
        "batch": batch,
        "tokens_per_second": batch / timing.p50,
        "bytes_per_step": read,
        "read_gb_per_second": read / timing.p50 / 1e9,
        "read_share": read / timing.p50 / 1e9 / arena.ceilings.read(),
    }
    seconds = getattr(lineup.decoder(contestant, batch), "freeze_seconds", 0.0)
    record(benchmark, arena, "decode", contestant, timing, **figures, freeze_seconds=seconds)


def test_prefill(
    benchmark: BenchmarkFixture, arena: Arena, size: str, dtype: str, length: int, contestant: str
) -> None:
    if contestant == PER_OP:
        pytest.skip(f"{PER_OP}: compared for decoding only")
    benchmark.group = f"2 prefill {size} {dtype} {length} tokens"
    lineup, tokens = arena.lineup(size, dtype), prompt(length)

    def make(name: str) -> Callable[[], object]:
        chosen = lineup.contestant(name)
        return lambda: chosen.prefill(tokens)

    timing = race_package(benchmark, arena, make, contestant, count=1, rounds=5)
    teraflops = lineup.checkpoint.prefill_flops(length) / timing.p50 / 1e12
    figures = {
        "size": size,
        "dtype": dtype,
        "length": length,
        "tokens_per_second": length / timing.p50,
        "teraflops": teraflops,
        "matmul_share": teraflops / arena.ceilings.matmul(dtype),
    }
    record(benchmark, arena, "prefill", contestant, timing, **figures)


def test_generate(benchmark: BenchmarkFixture, arena: Arena, size: str, dtype: str, program: str) -> None:
    tokens = 4 if arena.settings.smoke else 32
    benchmark.group = f"3 generate {size} {dtype} ({tokens} tokens after 16, nucleus)"
    lineup = arena.lineup(size, dtype)

    def make(name: str) -> Callable[[], object]:
        return package_writer(lineup, tokens) if name == PACKAGE else our_writer(arena, lineup, name, tokens)

    timing = race_package(benchmark, arena, make, program, count=1, rounds=5)
    record(benchmark, arena, "generate", program, timing, size=size, dtype=dtype, tokens_per_second=tokens / timing.p50)


def our_writer(arena: Arena, lineup: Lineup, name: str, tokens: int) -> Callable[[], object]:
    """The whole way: engine, forward pass, sampler, text."""
    lineup.contestant(name)  # so that one that cannot run says so
    runtime = Runtime(lineup.model, load_tokenizer(world_vocabulary()), arena.plugins, name)
    engine = runtime.engine("nucleus")

    def write() -> None:
        generation = engine.submit(runtime.request(prompt(16), max_tokens=tokens, seed=1))
        for _ in engine.stream(generation):
            pass
        assert len(generation.tokens) == tokens, f"it ended early: {generation.finish}"

    return write


def package_writer(lineup: Lineup, tokens: int) -> Callable[[], object]:
    from rwkv.utils import PIPELINE

    package = lineup.contestant(PACKAGE)
    assert isinstance(package, Package)
    model = package.model

    def write() -> None:
        logits, state = model.forward(list(prompt(16)), None)
        for place in range(tokens):
            token = PIPELINE.sample_logits(None, logits, top_p=0.8)  # it uses nothing of its pipeline
            if place + 1 < tokens:
                logits, state = model.forward([token], state)
        assert torch.isfinite(logits).all()

    return write

"""Reading prompts, writing tokens, and both with sampling, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena, Lineup, prompt
from benchmarks.contestants import TUNING
from benchmarks.package import PACKAGE, Package
from benchmarks.room import Unavailable
from benchmarks.timing import Timing, race, record
from rwkv_runtime import Runtime
from rwkv_runtime.tokenizer import load_tokenizer, world_vocabulary

Make = Callable[[str], Callable[[], object]]
"""Name of a contestant -> its step, ready and checked. Raises Unavailable."""
ROWS = 8
"""Most rows for which programs that read one after another take part."""


def race_package(benchmark: BenchmarkFixture, arena: Arena, make: Make, name: str, count: int, rounds: int) -> Timing:
    """A contestant against the `rwkv` package where that is there. Raises Unavailable for one that is not."""
    step = make(name)
    try:
        rival = None if name == PACKAGE else make(PACKAGE)
    except Unavailable:
        rival = None
    return race(benchmark, arena, step, rival, count=count, rounds=rounds)


def of_model(lineup: Lineup) -> dict[str, Any]:
    checkpoint = lineup.checkpoint
    return {"architecture": checkpoint.architecture.name, "size": checkpoint.size, "dtype": checkpoint.dtype}


def test_decode(benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, batch: int, contestant: str) -> None:
    # On a GPU waiting for a round's end shall not count, and one step in eight may write what the others have left.
    count = 2 if arena.settings.smoke else max(16 if arena.settings.device.type == "cuda" else 1, 16 // batch)
    model = of_model(lineup)
    benchmark.group = f"1 decode {' '.join(model.values())} batch {batch}"

    def make(name: str) -> Callable[[], object]:
        if name in TUNING and batch > 1 and not arena.settings.smoke:
            raise Unavailable("compared for one row only: tuning takes minutes")
        if name == PACKAGE and batch > ROWS:
            raise Unavailable(f"it has no batches: compared for up to {ROWS} rows")
        decoder = lineup.decoder(name, batch)
        decoder.feed(prompt(batch))
        return decoder.step

    timing = race_package(benchmark, arena, make, contestant, count, rounds=8)
    # The package reads the weights once a row; what counts is what a step has to read.
    moved = lineup.bytes_per_step(batch)
    figures = {
        "batch": batch,
        "tokens_per_second": batch / timing.p50,
        "bytes_per_step": moved,
        "read_gb_per_second": moved / timing.p50 / 1e9,
        "read_share": moved / timing.p50 / 1e9 / arena.ceilings.read(),
        "teraflops": lineup.checkpoint.decode_flops(batch) / timing.p50 / 1e12,
    }
    seconds = getattr(lineup.decoder(contestant, batch), "freeze_seconds", 0.0)
    record(benchmark, arena, "decode", contestant, timing, **model, **figures, freeze_seconds=seconds)


def test_prefill(
    benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, length: int, prompts: int, contestant: str
) -> None:
    model = of_model(lineup)
    benchmark.group = f"2 prefill {' '.join(model.values())} {prompts} x {length} tokens"
    texts = [prompt(length, start) for start in range(prompts)]

    def make(name: str) -> Callable[[], object]:
        if name in TUNING and not arena.settings.smoke:
            raise Unavailable("compared for decoding only: tuning takes minutes for every length")
        chosen = lineup.contestant(name)
        lineup.room_for_prompts(name, prompts, length)
        return lambda: chosen.prefill(texts)

    timing = race_package(benchmark, arena, make, contestant, count=1, rounds=5)
    teraflops = prompts * lineup.checkpoint.prefill_flops(length) / timing.p50 / 1e12
    figures = {
        "length": length,
        "prompts": prompts,
        "tokens_per_second": prompts * length / timing.p50,
        "teraflops": teraflops,
        "matmul_share": teraflops / arena.ceilings.matmul(lineup.checkpoint.dtype),
    }
    record(benchmark, arena, "prefill", contestant, timing, **model, **figures)


def test_generate(benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, program: str) -> None:
    tokens = 4 if arena.settings.smoke else 32
    model = of_model(lineup)
    benchmark.group = f"3 generate {' '.join(model.values())} ({tokens} tokens after 16, nucleus)"

    def make(name: str) -> Callable[[], object]:
        return package_writer(lineup, tokens) if name == PACKAGE else our_writer(arena, lineup, name, tokens)

    timing = race_package(benchmark, arena, make, program, count=1, rounds=5)
    record(benchmark, arena, "generate", program, timing, **model, tokens_per_second=tokens / timing.p50)


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

"""`python -m benchmarks.overhead`: how much of the decode loop's time the engine itself takes, and on what.

The loop, from the first token to the text, beside the same number of bare decode steps (forward pass and sampling),
in turn; reading the prompt is left out of both. On a GPU the engine works while the device does, so that what is left
is what the device waited.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import rwkv_runtime
from benchmarks.ceilings import synchronize
from benchmarks.machine import describe
from rwkv_runtime import Runtime
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Generation, Request

TOKENS, ROUNDS = 200, 15


def requests(runtime: Runtime, rows: int) -> list[Request]:
    """As rwkv-run makes them: to be kept, and stopped by a string that never comes."""
    prompt = tuple(runtime.tokenizer.encode("Tom found a map."))
    return [Request(prompt, {}, TOKENS, seed, ("\n\nUser:",), keep=True) for seed in range(rows)]


def begin(runtime: Runtime, engine: Engine) -> list[Generation]:
    """Texts whose prompts have been read."""
    generations = [engine.submit(request) for request in requests(runtime, engine.rows)]
    while engine.waiting or engine.prefilling:
        engine.step()
    return generations


def loop(engine: Engine, generations: Sequence[Generation]) -> int:
    """Writes the texts, as a caller who takes every piece; how many steps that took."""
    steps = 0
    while any(generation.finish is None for generation in generations):
        engine.step()
        steps += 1
        for generation in generations:
            while generation.pieces:
                generation.pieces.popleft()
    return steps


def bare(engine: Engine, steps: int) -> None:
    tick = engine._ticks[max(engine._ticks)]
    with torch.inference_mode():
        for _ in range(steps):
            tick()


def measure(runtime: Runtime, engine: Engine) -> tuple[float, float]:
    """Seconds of a step in the loop and bare, medians of rounds in turn."""
    looped, alone = [], []
    for _ in range(ROUNDS):
        generations = begin(runtime, engine)
        synchronize(engine.model.device)
        start = time.perf_counter()
        steps = loop(engine, generations)
        synchronize(engine.model.device)
        middle = time.perf_counter()
        bare(engine, steps)
        synchronize(engine.model.device)
        looped.append((middle - start) / steps)
        alone.append((time.perf_counter() - middle) / steps)
    return statistics.median(looped[1:]), statistics.median(alone[1:])


def profile(runtime: Runtime, engine: Engine, lines: int) -> None:
    """The runtime's own functions by the time they take themselves; profiling makes small ones look large."""
    generations = begin(runtime, engine)
    with cProfile.Profile() as profiler:
        loop(engine, generations)
    pstats.Stats(profiler).sort_stats("tottime").print_stats("/rwkv_runtime/", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine costs beside forward pass and sampling.")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the embedded model")
    parser.add_argument("--backends", nargs="+", default=["eager", "compile"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--sampler", default="nucleus")
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="show where the loop's time goes")
    options = parser.parse_args()
    for name in options.backends:
        runtime = rwkv_runtime.load(options.model, backend=name)
        engine = runtime.engine(options.sampler, options.rows)
        machine = describe(engine.model.device)
        looped, alone = measure(runtime, engine)
        print(
            f"{runtime.backend.name}, {options.rows} rows, {machine.get('gpu') or machine['cpu_model']}: "
            f"{looped * 1e6:.0f} us a step in the loop, {alone * 1e6:.0f} us bare: "
            f"{1 - alone / looped:.1%} outside forward pass and sampling"
        )
        if options.profile:
            profile(runtime, engine, options.profile)


if __name__ == "__main__":
    main()

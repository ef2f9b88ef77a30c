"""Checkpoints into memory, and a fresh process from its start to its first token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.checkpoints import Checkpoint
from benchmarks.contestants import PACKAGE, Package, why_no_package
from benchmarks.start import Start, environment
from benchmarks.timing import Timing, race, record
from rwkv_runtime.checkpoint import build_model, open_tensors


@pytest.mark.parametrize("loader", ["rwkv-runtime, .pth", "rwkv-runtime, .safetensors", PACKAGE])
def test_load(benchmark: BenchmarkFixture, arena: Arena, size: str, dtype: str, loader: str) -> None:
    """The file is in the system's cache: it was just written."""
    if loader == PACKAGE and (reason := why_no_package()):
        pytest.skip(reason)
    benchmark.group = f"6 load {size} {dtype}"
    checkpoint, device = arena.checkpoint(size, dtype), arena.settings.device
    path = checkpoint.safetensors() if loader.endswith(".safetensors") else checkpoint.pth

    def package() -> object:
        return Package(checkpoint, device)

    step: Callable[[], object] = package
    if loader != PACKAGE:
        step = lambda: build_model(open_tensors(path), arena.plugins.architectures, device)  # noqa: E731
    rival = None if loader == PACKAGE or why_no_package() else package
    timing = race(benchmark, arena, step, rival, rounds=3, warmup=1)
    megabytes = path.stat().st_size / 1e6
    record(
        benchmark,
        arena,
        "load",
        loader,
        timing,
        size=size,
        dtype=dtype,
        megabytes_per_second=megabytes / timing.p50,
    )


def test_start(benchmark: BenchmarkFixture, arena: Arena, tmp_path: Path, size: str, dtype: str, program: str) -> None:
    """A process of its own, so that its memory and its compiler's cache are its own."""
    if program == PACKAGE:
        reason = why_no_package()
    else:
        reason = arena.plugins.backends.get(program).why_not(arena.lineup(size, dtype).model)
    if reason:
        pytest.skip(f"{program}: {reason}")
    benchmark.group = f"7 start to first token {size} {dtype}"
    checkpoint = arena.checkpoint(size, dtype)
    cold = start(checkpoint, arena, program, tmp_path)  # the compiler's cache is empty, later it is not
    warm: list[Start] = []

    def again() -> None:
        warm.append(start(checkpoint, arena, program, tmp_path))

    benchmark.pedantic(again, rounds=arena.settings.rounds(3))
    best = min(warm, key=lambda s: s.first_token)
    timing = Timing(best.first_token, max(s.first_token for s in warm), None)
    figures = {
        "size": size,
        "dtype": dtype,
        "cold_first_token": cold.first_token,
        "cold_prepare": cold.prepare,
        **{f"warm_{name}": value for name, value in best._asdict().items() if name not in ("peak_gb", "first_token")},
        "peak_gb": best.peak_gb,
    }
    record(benchmark, arena, "start", program, timing, **figures)


def start(checkpoint: Checkpoint, arena: Arena, program: str, cache: Path) -> Start:
    command = [sys.executable, "-m", "benchmarks.start", str(checkpoint.pth), program, checkpoint.dtype]
    command.append(str(arena.settings.device))
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment(cache), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Start(**json.loads(done.stdout.splitlines()[-1]))

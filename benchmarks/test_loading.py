"""Checkpoints into memory, and a fresh process from its start to its first token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena, Lineup
from benchmarks.checkpoints import Checkpoint
from benchmarks.package import PACKAGE, SWITCHES, Package, why_no_package
from benchmarks.room import Unavailable, require
from benchmarks.start import TORCH_ALONE, Start, environment
from benchmarks.test_forward import of_model
from benchmarks.timing import Timing, race, record
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.runtime import why_not


@pytest.mark.parametrize("loader", ["rwkv-runtime, .pth", "rwkv-runtime, .safetensors", PACKAGE])
def test_load(benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, loader: str) -> None:
    """The file is in the system's cache: it was just written."""
    checkpoint, device, model = lineup.checkpoint, arena.settings.device, of_model(lineup)
    reason = why_no_package(checkpoint.architecture.name)
    if loader == PACKAGE and reason:
        raise Unavailable(reason)
    benchmark.group = f"6 load {' '.join(model.values())}"
    require(2 * checkpoint.nbytes, device, "two copies of the weights")
    path = checkpoint.safetensors() if loader.endswith(".safetensors") else checkpoint.pth

    def package() -> object:
        return Package(checkpoint, device)

    step: Callable[[], object] = package
    if loader != PACKAGE:
        step = lambda: build_model(open_tensors(path), arena.plugins.architectures, device)  # noqa: E731
    rival = None if loader == PACKAGE or reason else package
    timing = race(benchmark, arena, step, rival, rounds=3)
    megabytes = path.stat().st_size / 1e6
    record(benchmark, arena, "load", loader, timing, **model, megabytes_per_second=megabytes / timing.p50)


def test_start(benchmark: BenchmarkFixture, arena: Arena, lineup: Lineup, tmp_path: Path, program: str) -> None:
    """A process of its own, so that its memory and its compiler's cache are its own."""
    checkpoint, model = lineup.checkpoint, of_model(lineup)
    if program == PACKAGE:
        reason = why_no_package(checkpoint.architecture.name)
    else:
        reason = why_not(arena.plugins.backends.get(program), lineup.model)
    if reason:
        raise Unavailable(reason)
    benchmark.group = f"7 start to first token {' '.join(model.values())}"
    require(3 * checkpoint.nbytes, arena.settings.device, "a process of its own")
    # The compiler's cache is empty at first, later it is not; the package has none.
    cold = None if program == PACKAGE or arena.settings.smoke else start(checkpoint, arena, program, tmp_path)
    warm: list[Start] = []
    rounds = arena.settings.rounds(3)

    def again() -> None:
        warm.append(start(checkpoint, arena, program, tmp_path))

    benchmark.pedantic(again, rounds=rounds)
    best = min(warm, key=lambda s: s.first_token)
    timing = Timing(best.first_token, max(s.first_token for s in warm), None)
    figures: dict[str, float] = {f"warm_{name}": value for name, value in best._asdict().items() if name != "peak_gb"}
    figures["torch_alone"] = min(float(last_line(["-c", TORCH_ALONE], tmp_path, {})) for _ in range(rounds))
    if cold:
        figures |= {"cold_first_token": cold.first_token, "cold_prepare": cold.prepare}
    record(benchmark, arena, "start", program, timing, **model, **figures, peak_gb=best.peak_gb)


def start(checkpoint: Checkpoint, arena: Arena, program: str, cache: Path) -> Start:
    """The package starts without its CUDA kernels: its build of them would be timed with it."""
    command = ["-m", "benchmarks.start", str(checkpoint.pth), program, checkpoint.dtype, str(arena.settings.device)]
    variables = SWITCHES.get(checkpoint.architecture.name, {}) | {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    return Start(**json.loads(last_line(command, cache, variables)))


def last_line(command: list[str], cache: Path, variables: dict[str, str]) -> str:
    """What a fresh Python says at its end."""
    variables = environment(cache) | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | variables
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]

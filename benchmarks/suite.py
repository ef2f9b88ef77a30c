"""`python -m benchmarks.suite FOLDER --seconds 540`: the tests, then all of the protocol, on whatever machine this is.

What matters most comes first, each part in a process of its own; what does not fit into the seconds is left out, and
what was measured is in FOLDER/results.json however it ends. Nothing is installed and no setting of the machine is
changed. Beside the results: the report with its plots, what pytest said, and on a GPU its clocks every few seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report

ROOT = Path(__file__).parent.parent
GRACE = 20.0
"""Seconds that the benchmark in work has to end when no other begins any more, and those to end when interrupted."""
TESTS = 0.4
"""Of all seconds, what the test suite may take."""


class Part(NamedTuple):
    """Some of the benchmarks, chosen as pytest's -k does, and what they are asked for."""

    name: str
    select: str
    sizes: tuple[str, ...] = ("1.6b",)
    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (512,)
    prompts: tuple[int, ...] = (1,)
    architecture: str = "rwkv6"
    dtype: str = "bfloat16"

    def arguments(self, smoke: bool) -> list[str]:
        """For pytest; in a smoke run the smallest of everything."""
        words = ["benchmarks", "-k", self.select, "--architecture", self.architecture, "--dtype", self.dtype]
        if smoke:
            return [*words, "--smoke"]
        for option, values in (
            ("--size", self.sizes),
            ("--batch", self.batches),
            ("--length", self.lengths),
            ("--prompts", self.prompts),
        ):
            words += [word for value in values for word in (option, str(value))]
        return words


DECODE, PREFILL = "ceiling or (test_decode and not compile)", "ceiling or (test_prefill and not compile)"
WHOLE = "ceiling or (test_decode and compile and not per-op)"
"""A whole step through torch.compile; compiling takes long, so that it has parts of its own."""
ENGINE = "sampling_share or overhead or growth or generate or (test_sampling and nucleus)"
FEW = "and not compile and not script"
BOTH = f"ceiling or ((test_decode or test_prefill) {FEW})"
GPU = (
    Part("1.6b", BOTH, batches=(1, 256), lengths=(2048, 8192)),
    Part("sampling", f"sampling_share {FEW}"),
    Part("7b", BOTH, sizes=("7b",), batches=(1, 256), lengths=(2048,)),
    Part("3b", BOTH, sizes=("3b",), batches=(1, 256), lengths=(2048,)),
    Part("compile 1.6b", WHOLE),
    Part("start", f"test_start {FEW}"),
    Part("compile 7b", WHOLE, sizes=("7b",)),
    Part("engine", f"({ENGINE}) {FEW}"),
    Part("rwkv7", BOTH, batches=(1, 256), lengths=(2048,), architecture="rwkv7"),
    Part("batches", f"ceiling or (test_decode {FEW})", batches=(8, 32, 128, 512)),
    Part("prompts", f"ceiling or (test_prefill {FEW})", lengths=(128, 512, 8192), prompts=(1, 8)),
    Part("float16", f"ceiling or (test_decode {FEW})", dtype="float16"),
    Part("script", "ceiling or (test_decode and script)"),
    Part("per-op compile", "test_decode and per-op"),
    Part("compile start", f"(test_start or {ENGINE}) and compile"),
    Part("large batches", f"ceiling or (test_decode {FEW})", sizes=("3b", "7b"), batches=(8, 32, 128, 512)),
)
CPU = (
    Part("decode 1.6b", DECODE),
    Part("decode 0.1b", DECODE, sizes=("0.1b",), batches=(1, 8)),
    Part("prefill 0.1b", PREFILL, sizes=("0.1b",), lengths=(128, 512)),
    Part("prefill 1.6b", PREFILL),
    Part("engine", f"({ENGINE}) and not compile", sizes=("0.1b",)),
    Part("start", "test_start and not compile", sizes=("0.1b",)),
    Part("batch 1.6b", DECODE, batches=(8,)),
    Part("rwkv7 decode", DECODE, sizes=("0.1b",), batches=(1, 8), architecture="rwkv7"),
    Part("rwkv7 prefill", PREFILL, sizes=("0.1b",), architecture="rwkv7"),
    Part("float32 decode", DECODE, sizes=("0.1b",), dtype="float32"),
    Part("float32 prefill", PREFILL, sizes=("0.1b",), dtype="float32"),
    Part("decode 0.4b", DECODE, sizes=("0.4b",)),
    Part("rest", "test_tokenizer or vocabulary or test_load or test_sampling or test_package", sizes=("0.1b",)),
    Part("compile", "test_decode and compile", sizes=("0.1b",)),
    Part("compile start", f"(test_start or {ENGINE}) and compile", sizes=("0.1b",)),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of it [%(default).0f]")
    parser.add_argument("--part", action="append", help="a part by name, or `tests`; may be repeated [all]")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="keeps the random checkpoints there")
    parser.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--smoke", action="store_true", help="tiny models: does everything still run?")
    options = parser.parse_args(argv)
    device = options.device or found_device()
    parts = CPU if device == "cpu" else GPU
    known = ["tests", *(part.name for part in parts)]
    if unknown := set(options.part or ()) - set(known):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = options.part or known
    options.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(clocks(options.folder / "clocks.csv"))
        weights = options.weights or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rwkv-weights-")))
        suite = Suite(options.folder, weights, device, options.smoke, time.monotonic() + options.seconds)
        if "tests" in chosen:
            suite.pytest(["tests", "--durations=10"], "tests.txt", TESTS * options.seconds)
        for part in parts:
            if part.name in chosen:
                suite.benchmarks(part)
    results = options.folder / "results.json"
    if results.exists():
        report.main([str(results), "--output", str(options.folder / "benchmarks.md")])
    return int(suite.failed)


class Suite:
    """Parts one after another until the time is over."""

    def __init__(self, folder: Path, weights: Path, device: str, smoke: bool, end: float) -> None:
        self.folder, self.weights, self.device, self.smoke, self.end = folder, weights, device, smoke, end
        self.failed = False

    def benchmarks(self, part: Part) -> None:
        words = [*part.arguments(self.smoke), "--device", self.device, "--weights", str(self.weights)]
        words += ["--results", str(self.folder / "results.json")]
        left = self.end - time.monotonic() - 2 * GRACE
        self.pytest([*words, "--seconds", f"{left:.0f}"], "benchmarks.txt", left + GRACE)

    def pytest(self, words: Sequence[str], log: str, seconds: float) -> None:
        """Runs pytest for at most so many seconds and then stops it as Ctrl-C does, so that it still sums up."""
        name = " ".join(words)
        if seconds <= GRACE:
            print(f"left out, the time is over: {name}", flush=True)
            return
        begin = time.monotonic()
        with (self.folder / log).open("a") as output:
            print(f"\n== {name}", file=output, flush=True)
            # What a backend warns of, a graph that it could not capture say, is part of what was measured.
            command = [sys.executable, "-m", "pytest", "-o", "log_cli=true", "--log-cli-level=WARNING", *words]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = stop(process)
        self.failed |= code != 0
        how = {0: "passed", 5: "chose nothing"}.get(code, f"ended with {code}, see {log}")
        print(f"{how} in {time.monotonic() - begin:.0f} s: {name}", flush=True)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupts a process; ends it and all that it has started where that takes too long."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


@contextlib.contextmanager
def clocks(path: Path) -> Iterator[None]:
    """Writes the GPU's clocks every five seconds, as nvidia-smi reads them; nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    query = "timestamp,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
    with path.open("w") as output:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv", "--loop=5", "--id=0"]
        watcher = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            watcher.terminate()
            watcher.wait()


def found_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.kernels --size 1.6b --batch 1 --length 2048`: where a GPU's time goes in the `fused` backend.

A decode step as the engine freezes it, sampler included, and a prompt: how long each takes, its share of what the
memory and the matrix units can do, and each kernel's part of it. `--try tile_rows=4,programs=396` measures with these
fields of `Tuning` as well; it may be repeated. `--zeros 0.8` makes so many of the value matrix's inputs zero, as they
are in a trained model (`python -m benchmarks.sparsity`); the shares are still of what a dense step reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rwkv_backends.fused import Fused
from rwkv_backends.kernels.tuning import Tuning

from benchmarks.arena import collect, prompt
from benchmarks.ceilings import Ceilings
from benchmarks.checkpoints import SIZES, Checkpoint, make_checkpoint
from rwkv_runtime import Model, Plugins
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.settings import DTYPES, STATE_DTYPES
from rwkv_runtime.tokenizer import load_tokenizer, world_vocabulary

CUDA = torch.device("cuda", 0)
ROUNDS, REPLAYS = 7, 20
Times = Mapping[str, tuple[int, float]]
"""Kernel -> how often it ran and the microseconds that it took in all, of one step."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--architecture", default="rwkv6")
    parser.add_argument("--size", default="1.6b", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--state-dtype", default="float32", choices=STATE_DTYPES, help="of the recurrent state")
    parser.add_argument("--batch", type=int, action="append", default=[], help="rows of a decode step; may be repeated")
    parser.add_argument("--length", type=int, action="append", default=[], help="tokens of a prompt; may be repeated")
    parser.add_argument("--sampler", default="nucleus")
    parser.add_argument("--try", dest="tries", action="append", default=[], type=changed, metavar="NAME=VALUE,...")
    parser.add_argument(
        "--profile", action="store_true", help="each kernel's part; waiting counts where kernels overlap"
    )
    parser.add_argument("--zeros", type=float, help="of the value matrix's inputs [as random weights have it: half]")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="keeps the random checkpoints there")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    plugins, ceilings = Plugins.load(), Ceilings(CUDA, smoke=False)
    with tempfile.TemporaryDirectory(prefix="rwkv-weights-") as temporary:
        folder = options.weights or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        architecture = plugins.architectures.get(options.architecture)
        checkpoint = make_checkpoint(architecture, options.size, options.dtype, folder)
        tensors = checkpoint.tensors()
        if options.zeros is not None:
            try:
                tensors = with_zeros(tensors, options.zeros)
            except ValueError as error:
                parser.error(f"--zeros: {error}")
        kept = STATE_DTYPES[options.state_dtype]
        model = build_model(tensors, plugins.architectures, CUDA, state_dtype=kept)
    print(f"{torch.cuda.get_device_name()}: {ceilings.read():.0f} GB/s read; state {options.state_dtype}", flush=True)
    expected: dict[int, torch.Tensor] = {}
    for tuning in [Tuning(), *options.tries]:
        differs = ", ".join(f"{name}={value}" for name, value in changes(tuning).items()) or "as it is"
        for rows in options.batch:
            step, logits = decode_step(plugins, model, tuning, options.sampler, rows)
            expected.setdefault(rows, logits)
            off = float((logits - expected[rows]).norm() / expected[rows].norm())
            what = f"{options.size} decode {rows}: {differs}"
            cycle = tuning.deferred or 1  # of steps, one of which writes a row's state
            report(what, step, decode_share(checkpoint, model, rows, ceilings), cycle)
            print(f"  logits differ from the first by {off:.0e}", flush=True)
            if options.profile:
                print_profile(step, 5 * cycle)
        for length in options.length:
            step = prompt_step(model, tuning, length)
            report(f"{options.size} prompt {length}: {differs}", step, prompt_share(checkpoint, length, ceilings))
            if options.profile:
                print_profile(step)
        collect()
    return 0


def with_zeros(tensors: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Keys such that relu^2 of this share is zero: some rows of the key matrix are, the others mean what they did.

    Of what rows that are not zero give, half is negative. Raises ValueError for a share below that half.
    """
    kept = 2 * (1 - share)
    if not 0 <= kept <= 1:
        raise ValueError(f"of inputs from random weights half are zero: {share:g} is not between 0.5 and 1")
    draw = torch.Generator().manual_seed(1)
    sparse = dict(tensors)
    for name, t in tensors.items():
        if name.endswith(".ffn.key.weight"):
            sparse[name] = t * (torch.rand(len(t), 1, generator=draw) < kept).to(t.dtype)
    return sparse


def changed(text: str) -> Tuning:
    """`NAME=VALUE,NAME=VALUE`: the default with these."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    known = {field.name for field in dataclasses.fields(Tuning)}
    if unknown := {name for name, _, _ in pairs} - known:
        raise argparse.ArgumentTypeError(f"Tuning has no {', '.join(unknown)}")
    return Tuning(**{name: int(value) for name, _, value in pairs})


def changes(tuning: Tuning) -> dict[str, int]:
    usual = dataclasses.asdict(Tuning())
    return {name: value for name, value in dataclasses.asdict(tuning).items() if value != usual[name]}


def decode_step(
    plugins: Plugins, model: Model, tuning: Tuning, sampler: str, rows: int
) -> tuple[Callable[[], None], torch.Tensor]:
    """One replay of the engine's own frozen step, and the logits [rows, V] of the eighth one."""
    tokenizer = load_tokenizer(world_vocabulary())
    engine = Engine(model, Fused(tuning), plugins.sampler(sampler), tokenizer, rows)
    for place in range(8):
        engine.tokens.copy_(torch.tensor(prompt(rows, place))[:, None])
        engine._ticks[rows]()
    return engine._ticks[rows], torch.where(engine.logits.isfinite(), engine.logits, 0.0)


def prompt_step(model: Model, tuning: Tuning, length: int) -> Callable[[], None]:
    forward, state = Fused(tuning).forward(model), model.new_state()
    tokens = torch.tensor([prompt(length)], device=CUDA)

    @torch.inference_mode()
    def step() -> None:
        forward(tokens, state)

    return step


def decode_share(checkpoint: Checkpoint, model: Model, rows: int, ceilings: Ceilings) -> Callable[[float], str]:
    """A step reads every matrix once, and each row's state, as it is kept, which it also writes: all of it is counted
    where it is not written at each step, too, as `pytest benchmarks` does."""
    moved = checkpoint.matrix_bytes + 2 * rows * model.new_state().nbytes
    return lambda seconds: f"{rows / seconds:.0f} tok/s, {moved / seconds / 1e9 / ceilings.read():.1%} of the read rate"


def prompt_share(checkpoint: Checkpoint, length: int, ceilings: Ceilings) -> Callable[[float], str]:
    """Of large products that follow each other for as long: by then the power that a GPU may draw limits its clock."""
    product = ceilings.probe(f"matmul {checkpoint.dtype}")
    peak = product.rate(step_seconds(product.run)) * 1e12
    flops = checkpoint.prefill_flops(length)
    return lambda seconds: f"{length / seconds:.0f} tok/s, {flops / seconds / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"


def report(what: str, step: Callable[[], None], share: Callable[[float], str], cycle: int = 1) -> None:
    seconds, alone = step_seconds(step, cycle), wall_seconds(step, cycle)
    print(f"{what}: {seconds * 1e6:.1f} us, {share(seconds)}; alone {alone * 1e6:.1f} us of the wall clock", flush=True)


def step_seconds(step: Callable[[], None], cycle: int = 1) -> float:
    """Median of some rounds of whole cycles, by the device's own clock."""
    replays = -(-REPLAYS // cycle) * cycle
    for _ in range(3):
        step()
    rounds = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            step()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / replays / 1e3)
    return statistics.median(rounds)


def wall_seconds(step: Callable[[], None], cycle: int = 1) -> float:
    """Of steps that each begin on an idle device and are waited for: what the host adds shows. Median of the means of
    whole cycles."""
    rounds = []
    for _ in range(ROUNDS):
        seconds = 0.0
        for _ in range(cycle):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds += time.perf_counter() - begin
        rounds.append(seconds / cycle)
    return statistics.median(rounds)


def print_profile(step: Callable[[], None], steps: int = 5, lines: int = 30) -> None:
    """Kernels by what they take of a step; what the step takes beyond their sum are gaps between them."""
    times = profile(step, steps)
    total = sum(us for _, us in times.values())
    print(f"  {total:.1f} us in {sum(count for count, _ in times.values())} kernels")
    for name, (count, us) in sorted(times.items(), key=lambda item: -item[1][1])[:lines]:
        print(f"  {us:9.1f} us {us / total:6.1%} {count:5d} x {us / max(count, 1):8.2f} us  {name[:90]}")
    sys.stdout.flush()


def profile(step: Callable[[], None], steps: int) -> Times:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return {
        event.key: (round(event.count / steps), event.self_device_time_total / steps)
        for event in run.key_averages()
        if event.self_device_time_total
    }


if __name__ == "__main__":
    sys.exit(main())

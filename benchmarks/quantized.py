"""`python -m benchmarks.quantized`: what int8 weights save, what they cost, and where each way to multiply wins.

Sizes, speed and bits per byte are those of the embedded model (or `--model`). Without `--corpus` the text is the short
one beside this file, which was written for it and which no model was trained on; with it, the held-out documents of a
folder that `training.prepare` would read. With `--size 0.4b` the weights are random, and there is nothing to predict.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rwkv_layers.linear import quantized
from rwkv_layers.matrices import quantize
from torch import Tensor

import rwkv_runtime
from benchmarks.checkpoints import SIZES, make_checkpoint
from benchmarks.machine import describe
from rwkv_runtime import Runtime

SAMPLE = Path(__file__).with_name("heldout.txt")
SEPARATOR = "\n<|endoftext|>\n"
SHAPES = ((256, 256), (896, 256), (2048, 2048), (7168, 2048))
ROWS = (1, 2, 4, 8, 16, 64)
ROUNDS = 15


def sample() -> list[str]:
    """The documents of the text beside this file."""
    return SAMPLE.read_text(encoding="utf-8").strip().split(SEPARATOR)


def bits_per_byte(model: Runtime, documents: Iterable[str]) -> float:
    """As `training.evaluate` counts: each document from a fresh state after id 0, its end predicted too."""
    nats, size = 0.0, 0
    for document in documents:
        tokens = [*model.tokenizer.encode(document), 0]
        log_probs = torch.log_softmax(model.logits([0, *tokens[:-1]]), dim=-1)
        nats -= float(log_probs.gather(1, torch.tensor(tokens, device=log_probs.device)[:, None]).double().sum())
        size += len(document.encode())
    return nats / math.log(2) / size


def weight_bytes(weights: object) -> int:
    if isinstance(weights, Tensor):
        return weights.numel() * weights.element_size()
    return sum(map(weight_bytes, weights)) if isinstance(weights, tuple) else 0


def side_by_side(runs: Sequence[Callable[[], object]], seconds: float = 0.02) -> list[float]:
    """Seconds of one call of each: the median of rounds run in turn, so that a slow moment hits all."""
    counts = []
    for run in runs:
        run()
        begin = time.perf_counter()
        run()
        counts.append(max(1, int(seconds / (time.perf_counter() - begin))))
    rounds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, count, times in zip(runs, counts, rounds, strict=True):
            begin = time.perf_counter()
            for _ in range(count):
                run()
            times.append((time.perf_counter() - begin) / count)
    return [statistics.median(times) for times in rounds]


def compare_decoding(models: Sequence[Runtime]) -> list[float]:
    """Tokens a second of each model's own decode step, one row, the sampler included."""
    ticks = [model.engine("nucleus")._ticks[1] for model in models]
    with torch.inference_mode():
        return [1 / seconds for seconds in side_by_side(ticks, 0.1)]


def compare_products(D: int, C: int, M: int) -> list[float]:
    """Seconds of one product of M rows with a bfloat16 [D, C]: dense; as `quantized` chooses; by torch's int8 kernel;
    by widening the weights first; by torchao where it is installed. Large ones take turns, so that they do not lie in
    the cache."""
    copies = max(1, min(8, 200_000_000 // (D * C)))
    dense = [torch.randn(D, C).bfloat16() for _ in range(copies)]
    values, steps = zip(*(quantize(weight.float()) for weight in dense), strict=True)
    x, turn = torch.randn(M, C).bfloat16(), iter(range(1 << 62))
    scale = steps[0].bfloat16()
    runs = [
        lambda: F.linear(x, dense[next(turn) % copies]),
        lambda: quantized(x, values[next(turn) % copies], steps[0]),
        lambda: torch._weight_int8pack_mm(x, values[next(turn) % copies], scale),
        lambda: F.linear(x, values[next(turn) % copies].bfloat16()) * scale,
    ]
    if find_spec("torchao"):
        layers = [torchao_linear(weight) for weight in dense]
        runs.append(lambda: layers[next(turn) % copies](x))
    with torch.inference_mode():
        return side_by_side(runs, 0.002)


def torchao_linear(weight: Tensor) -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    holder = torch.nn.ModuleList([layer])
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


def held_out(folder: Path, count: int) -> dict[str, list[str]]:
    """The first held-out documents of each source of a corpus."""
    from training.prepare import read_corpus

    return {source: splits["heldout"][:count] for source, splits in read_corpus(folder).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What int8 weights save and cost.")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the embedded model")
    parser.add_argument("--size", choices=SIZES, help="random bfloat16 weights of this size instead")
    parser.add_argument("--backends", nargs="*", default=["eager", "compile"])
    parser.add_argument("--corpus", type=Path, help="measure bits per byte on its held-out documents")
    parser.add_argument("--documents", type=int, default=100, help="of each source of the corpus")
    parser.add_argument("--products", action="store_true", help="time single products too, by rows")
    options = parser.parse_args()
    machine = describe(torch.device("cpu"))
    print(f"{machine['cpu_model']}, {machine['threads']} threads ({', '.join(machine['cpu_flags'])})")
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if options.size:
            rwkv6 = rwkv_runtime.Plugins.load().architectures.get("rwkv6")
            path = make_checkpoint(rwkv6, options.size, "bfloat16", Path(folder)).pth
        report_models(path, options.backends)
        if not options.size:
            report_text(
                path, held_out(options.corpus, options.documents) if options.corpus else {SAMPLE.name: sample()}
            )
    if options.products:
        report_products()


def report_models(path: Path | None, backends: Sequence[str]) -> None:
    for backend in backends:
        pair = [rwkv_runtime.load(path, backend=backend, quant=quant) for quant in (None, "int8")]
        own, rounded = compare_decoding(pair)
        print(f"decode, {pair[0].backend.name}: {own:.1f} and {rounded:.1f} tokens a second, {rounded / own:.2f}x")
    pair = [rwkv_runtime.load(path, backend="eager", quant=quant) for quant in (None, "int8")]
    whole = [weight_bytes(model.model.weights) / 1e6 for model in pair]
    read = [size - weight_bytes(model.model.weights.emb) / 1e6 for size, model in zip(whole, pair, strict=True)]
    print(f"weights: {whole[0]:.2f} MB {pair[0].model.dtype}, {whole[1]:.2f} MB int8", end="; ")
    print(f"without the embedding {read[0]:.2f} and {read[1]:.2f} MB, {read[1] / read[0]:.2f}x")


def report_text(path: Path | None, texts: Mapping[str, Sequence[str]]) -> None:
    models = [rwkv_runtime.load(path, backend="eager", quant=quant) for quant in (None, "int8")]
    for source, documents in texts.items():
        own, rounded = (bits_per_byte(model, documents) for model in models)
        size = sum(len(document.encode()) for document in documents)
        print(
            f"bits per byte, {source} ({size:,} bytes): {own:.4f} and {rounded:.4f}, {rounded - own:+.4f}", flush=True
        )


def report_products() -> None:
    print("microseconds of a product: dense bfloat16 | as chosen | torch's int8 kernel | widened first [| torchao]")
    for D, C in SHAPES:
        for M in ROWS:
            times = compare_products(D, C, M)
            print(f"{M:3d} x [{D}, {C}]  " + " | ".join(f"{seconds * 1e6:7.0f}" for seconds in times), flush=True)


if __name__ == "__main__":
    main()

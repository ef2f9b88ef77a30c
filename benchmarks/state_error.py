"""`python -m benchmarks.state_error`: what a recurrent state in 16 bits does to the predictions of a model.

The embedded model, or another, in float32 and by plain torch, writes texts, drawn from a fixed seed, through one end of
text after another. The same tokens are read with a state that is rounded after each of them, to either kind of 16 bits;
with one that is rounded to bfloat16 where it is read, and kept as it is, as `fused` does for many rows; and, to compare
with, by the model in bfloat16 with a state in float32. Printed are the Kullback-Leibler divergence from
what the model predicts itself, and how often another token is the most likely one; then how far off a state is that
hardly forgets, of random keys and values.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rwkv_backends.eager import Eager
from torch import Tensor

from rwkv_runtime import Model, Plugins, State
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model

HALVES = (torch.float16, torch.bfloat16)


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """float32, with no more digits than dtype has and within its range."""
    most = torch.finfo(dtype).max
    return t.clamp(-most, most).to(dtype).float()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Reader:
    """A model that reads many texts at once, a token at a time.

    Its state is rounded to `kept` after each, and to `seen` for what comes of a token, but not for what it becomes.
    """

    def __init__(
        self, model: Model, texts: int, kept: torch.dtype = torch.float32, seen: torch.dtype = torch.float32
    ) -> None:
        self.forward, self.state = Eager().forward(model), model.new_state(texts)
        self.kept, self.seen, self.rounded = kept, seen, model.architecture.rounded
        self.bits, self.changed = 0.0, 0

    def read(self, tokens: Tensor) -> Tensor:
        """tokens [texts, 1] -> log2 of the probabilities of what may be next, float64 [texts, V]."""
        if self.seen == torch.float32:
            logits = self.forward(tokens, self.state)
        else:
            seen = self.state.clone()
            self._round(seen, self.seen)
            logits = self.forward(tokens, seen)
            self.forward(tokens, self.state)
        self._round(self.state, self.kept)
        return logits.double().log_softmax(-1) / math.log(2)

    def _round(self, state: State, dtype: torch.dtype) -> None:
        for name in self.rounded:
            state[name].copy_(rounded(state[name], dtype))

    def compare(self, tokens: Tensor, exact: Tensor) -> None:
        """Adds up how far it is from the log2 probabilities `exact`."""
        ours = self.read(tokens)
        self.bits += float((exact.exp2() * (exact - ours)).sum())
        self.changed += int((ours.argmax(-1) != exact.argmax(-1)).sum())


@torch.inference_mode()
def compare(model: Model, readers: Sequence[Reader], texts: int, length: int, seed: int = 0) -> float:
    """The model writes, the others read it; returns the entropy of its predictions, bits a token."""
    draw, writer = torch.Generator().manual_seed(seed), Reader(model, texts)
    tokens, entropy = torch.zeros((texts, 1), dtype=torch.int64), 0.0
    for _ in range(length):
        exact = writer.read(tokens)
        for reader in readers:
            reader.compare(tokens, exact)
        entropy -= float((exact.exp2() * exact).sum())
        tokens = torch.multinomial(exact.exp2(), 1, generator=draw)
    return entropy / (texts * length)


def remembered(dtype: torch.dtype, decay: float, length: int, size: int = 64, seed: int = 0) -> float:
    """How far off, relative to its norm, S <- decay S + k^T v is after many tokens, rounded after each."""
    draw = torch.Generator().manual_seed(seed)
    exact, ours = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size)
    for _ in range(length):
        k, v = torch.randn(2, size, generator=draw)
        exact = decay * exact + torch.outer(k, v)
        ours = rounded(decay * ours + torch.outer(k, v), dtype)
    return float((ours - exact).norm() / exact.norm())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state_error", description=__doc__)
    parser.add_argument("--model", type=Path, help="a trained model [the embedded one]")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of each text")
    parser.add_argument("--decay", type=float, default=0.9995, help="of the state that hardly forgets")
    parser.add_argument("--tokens", type=int, default=8000, help="that this state has seen")
    options = parser.parse_args(argv)
    tensors, plugins = open_tensors(options.model or embedded_model()), Plugins.load()
    wide, narrow = (
        build_model(tensors, plugins.architectures, torch.device("cpu"), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    readers = {f"state in {name_of(kept)}": Reader(wide, options.texts, kept) for kept in HALVES}
    readers["state read in bfloat16"] = Reader(wide, options.texts, seen=torch.bfloat16)
    readers["model in bfloat16"] = Reader(narrow, options.texts)
    entropy = compare(wide, list(readers.values()), options.texts, options.length)
    count = options.texts * options.length
    print(f"{options.texts} texts of {options.length} tokens, entropy {entropy:.2f} bits a token", flush=True)
    for name, reader in readers.items():
        print(
            f"{name}: {reader.bits / count:.1e} bits a token, {reader.changed / count:.3%} of most likely tokens differ"
        )
    print(f"a decay of {options.decay:g}, after {options.tokens} tokens:")
    for kept in HALVES:
        off = remembered(kept, options.decay, options.tokens)
        print(f"state in {name_of(kept)}: {off:.2%} off")
    return 0


if __name__ == "__main__":
    sys.exit(main())

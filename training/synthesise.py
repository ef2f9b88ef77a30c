"""Text by larger models that read the same corpus, for a small one to learn from beside it.

Usage: ``python -m training.synthesise DATA_FOLDER OUT.npy TEACHER.safetensors ... --tokens 20000000``.

A small model that reads a small corpus many times learns it by heart; what its teachers write is never the same
twice.  Several teachers draw together, each token from the mean of their probabilities, which predicts better than
any of them (sequence-level distillation: Kim & Rush 2016, arXiv 1606.07947; of ensembles, and mixed with the corpus:
Kim et al. 2025, arXiv 2509.14786).  Texts begin as some document of one source does, and go on after their ends, as
windows of the corpus do: with another document like it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rwkv_runtime import Backend, Model, Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors
from training.arrays import load_tokens


class Writers:
    """Models that write many texts at once, each token drawn from the mean of what they expect."""

    def __init__(self, models: Sequence[Model], backend: Backend, rows: int, length: int, openings: Tensor) -> None:
        """`openings` [D, P]: the first tokens of documents, id 0 among them; each text begins with one of them."""
        device = models[0].device
        self.openings = openings.to(device)
        self.begin = torch.zeros(rows, openings.shape[1], dtype=torch.int64, device=device)
        self.forwards = [backend.forward(model) for model in models]
        self.states = [model.new_state(rows) for model in models]
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.written = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        kept = [tensor for state in self.states for tensor in state.tensors.values()]
        with torch.no_grad():
            self.tick = backend.freeze(self._tick, [self.tokens, self.written, self.place, *kept])

    def _tick(self) -> None:
        """Writes the tokens at hand down and draws the next ones."""
        self.written.index_copy_(1, self.place, self.tokens)
        self.place.add_(1)
        pairs = zip(self.forwards, self.states, strict=True)
        expected = torch.stack([forward(self.tokens, state).softmax(-1) for forward, state in pairs]).mean(0)  # [B, V]
        # The largest of p / e, with e exponentially distributed, is drawn by p.
        noise = torch.empty_like(expected).exponential_().clamp(min=1e-20)
        drawn = (expected / noise).argmax(-1, keepdim=True)
        given = self.begin.index_select(1, self.place.clamp(max=self.begin.shape[1] - 1))
        self.tokens.copy_(torch.where(self.place < self.begin.shape[1], given, drawn))

    @torch.no_grad()
    def write(self) -> Tensor:
        """Texts [rows, length]."""
        for state in self.states:
            for row in range(len(self.begin)):
                state.clear(row)
        chosen = torch.randint(len(self.openings), (len(self.begin),), device=self.begin.device)
        self.begin.copy_(self.openings[chosen])
        self.tokens.copy_(self.begin[:, :1])
        self.place.zero_()
        for _ in range(self.written.shape[1]):
            self.tick()
        return self.written.clone()


def find_openings(tokens: npt.NDArray[np.uint16], size: int) -> Tensor:
    """The first tokens of each document of at least so many, id 0 included: [D, size]."""
    starts = np.flatnonzero(tokens == 0)
    long = starts[np.diff(starts, append=len(tokens)) >= size]
    return torch.from_numpy(tokens[long[:, None] + np.arange(size)].astype(np.int64))


def whole_documents(texts: Tensor) -> npt.NDArray[np.uint16]:
    """Rows [B, T] that begin with id 0, one after the other, each up to its last id 0 but without that."""
    rows = texts.cpu().numpy().astype(np.uint16)
    lasts = [int(np.flatnonzero(row == 0)[-1]) for row in rows]
    return np.concatenate([row[:last] for row, last in zip(rows, lasts, strict=True)])


def synthesise(writers: Writers, tokens: int, seconds: float = math.inf) -> npt.NDArray[np.uint16]:
    """At least so many tokens of whole documents, each begun by id 0; fewer, but some, where the seconds are over.

    Raises:
        ValueError: hardly any text ends within the length.
    """
    parts: list[npt.NDArray[np.uint16]] = []
    started, count, drawn = time.perf_counter(), 0, 0
    while not parts or (count < tokens and time.perf_counter() - started < seconds):
        texts = writers.write()
        parts.append(whole_documents(texts))
        count, drawn = count + len(parts[-1]), drawn + texts.numel()
        if count < drawn // 100:
            raise ValueError(f"of {drawn} tokens only {count} are in texts that end: give them more --length")
        print(f"{count} tokens of {drawn} kept, {time.perf_counter() - started:.0f} s", flush=True)
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Let models write text to train another on.")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--source", default="tinystories_pieces", help="whose beginnings the texts have")
    parser.add_argument("--opening", type=int, default=6, help="tokens of such a beginning, its id 0 among them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of the runtime; fused on a GPU, eager without")
    a = parser.parse_args()
    device, plugins = torch.device(a.device), Plugins.load()
    backend = plugins.backends.get(a.backend or ("fused" if device.type == "cuda" else "eager"))
    models = [build_model(open_tensors(path), plugins.architectures, device) for path in a.models]
    torch.manual_seed(a.seed)
    openings = find_openings(load_tokens(a.data / f"{a.source}.train.npy.xz"), a.opening)
    writers = Writers(models, backend, a.rows, a.length, openings)
    written = synthesise(writers, a.tokens, 60.0 * a.minutes)
    partial = a.output.with_name(f"{a.output.name}.partial")  # whole or not at all: a step that is done has its file
    with partial.open("wb") as file:
        np.save(file, written)
    partial.replace(a.output)


if __name__ == "__main__":
    main()

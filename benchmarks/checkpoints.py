"""Random checkpoints of known sizes, written to disk so that every contestant reads the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.room import require, require_disk
from rwkv_runtime import Architecture
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.settings import DTYPES

SIZES: Mapping[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "0.1b": (12, 768),
    "0.4b": (24, 1024),
    "1.6b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
}
"""Layers and width by name. With its embedding, what is called 0.1b here has 0.2 billion weights."""
BRANCHES = (".att.output.weight", ".ffn.value.weight")
"""What each block adds to the residual stream goes through these."""
VOCAB_SIZE = 65536
"""That of RWKV World's models."""
DRAWN = 2
"""Layers with random numbers of their own: the first, which may differ from the others, and the next."""


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk."""

    architecture: Architecture
    size: str
    dtype: str
    pth: Path
    matrix_bytes: int
    """What one decode step has to read: all matrices but the embedding, of which it reads one row."""
    block_weights: int
    """Weights in the matrices of all blocks: every token of a prompt multiplies with each once."""
    head_weights: int
    """Weights in the head: only the last token of a prompt goes through it."""

    @property
    def nbytes(self) -> int:
        return self.pth.stat().st_size

    def prefill_flops(self, length: int) -> int:
        """Floating point operations in the matrix products of one prompt."""
        return 2 * (self.block_weights * length + self.head_weights)

    def decode_flops(self, rows: int) -> int:
        """The same of one step of a batch."""
        return 2 * rows * (self.block_weights + self.head_weights)

    def tensors(self) -> dict[str, Tensor]:
        """Memory-mapped from the file."""
        return open_tensors(self.pth)

    def safetensors(self) -> Path:
        """The same weights as a .safetensors file, written when first asked for."""
        from safetensors.torch import save_file

        path = self.pth.with_suffix(".safetensors")
        if not path.exists():
            require_disk(self.nbytes, path.parent)
            save_file({name: t.contiguous() for name, t in self.tensors().items()}, path)
        return path

    def delete(self) -> None:
        """Takes all files made of these weights off the disk."""
        for path in self.pth.parent.glob(f"{self.pth.stem}*"):
            path.unlink()


def make_checkpoint(architecture: Architecture, size: str, dtype: str, folder: Path) -> Checkpoint:
    """Random weights of a size. They are good for timing dense arithmetic only: they say nothing of sparsity.

    A deep stack of random blocks is chaotic: rounding alone would change its logits beyond recognition. With what
    each block adds made small, as training makes it, logits can be checked in 16 bits too.

    Drawing billions of random numbers takes minutes: all layers from the third on are the second one's numbers,
    shifted by some places each, so that a contestant that mixes up layers is still found out. Raises Unavailable
    where memory or disk are too small. A file that is there already is taken.
    """
    pth = folder / f"{architecture.name}-{size}-{dtype}.pth"
    if pth.exists():
        return _measured(architecture, size, dtype, pth)
    layers, width = SIZES[size]
    drawn = architecture.random(architecture.sizes(DRAWN, width, VOCAB_SIZE), dtype=DTYPES[dtype])
    for name, t in drawn.items():
        if name.endswith(BRANCHES):
            t.mul_(1 / (2 * layers))
    last = f"blocks.{DRAWN - 1}."
    block = {name.removeprefix(last): t for name, t in drawn.items() if name.startswith(last)}
    more = (layers - DRAWN) * sum(t.nbytes for t in block.values())
    require(more, torch.device("cpu"), f"a checkpoint of {size}")
    require_disk(more + sum(t.nbytes for t in drawn.values()), folder)
    tensors = dict(drawn)
    for i in range(DRAWN, layers):
        tensors |= {f"blocks.{i}.{name}": t.roll(i) for name, t in block.items()}
    torch.save(tensors, pth)
    return _measured(architecture, size, dtype, pth)


def _measured(architecture: Architecture, size: str, dtype: str, pth: Path) -> Checkpoint:
    tensors = open_tensors(pth)
    blocks = sum(t.numel() for name, t in tensors.items() if name.startswith("blocks.") and max(t.shape) < t.numel())
    head = tensors["head.weight"].numel()
    itemsize = DTYPES[dtype].itemsize
    return Checkpoint(architecture, size, dtype, pth, (blocks + head) * itemsize, blocks, head)

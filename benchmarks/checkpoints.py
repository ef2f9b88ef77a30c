"""Random checkpoints of known sizes, written to disk so that every contestant reads the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_runtime import Architecture
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.runtime import DTYPES

SIZES: Mapping[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "0.1b": (12, 768),
    "0.4b": (24, 1024),
    "1.6b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
}
"""Layers and width by name."""
BRANCHES = (".att.output.weight", ".ffn.value.weight")
"""What each block adds to the residual stream goes through these."""
VOCAB_SIZE = 65536
"""That of RWKV World's models."""


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk."""

    size: str
    dtype: str
    pth: Path
    matrix_bytes: int
    """What one decode step has to read: all matrices but the embedding, of which it reads one row."""
    block_weights: int
    """Weights in the matrices of all blocks: every token of a prompt multiplies with each once."""
    head_weights: int
    """Weights in the head: only the last token of a prompt goes through it."""

    def prefill_flops(self, length: int) -> int:
        """Floating point operations in the matrix products of one prompt."""
        return 2 * (self.block_weights * length + self.head_weights)

    def tensors(self) -> dict[str, Tensor]:
        """Memory-mapped from the file."""
        return open_tensors(self.pth)

    def safetensors(self) -> Path:
        """The same weights as a .safetensors file, written when first asked for."""
        from safetensors.torch import save_file

        path = self.pth.with_suffix(".safetensors")
        if not path.exists():
            save_file({name: t.contiguous() for name, t in self.tensors().items()}, path)
        return path


def make_checkpoint(architecture: Architecture, size: str, dtype: str, folder: Path) -> Checkpoint:
    """Random weights of a size. They are good for timing dense arithmetic only: they say nothing of sparsity.

    A deep stack of random blocks is chaotic: rounding alone would change its logits beyond recognition. With what
    each block adds made small, as training makes it, logits can be checked in 16 bits too.
    """
    layers, width = SIZES[size]
    tensors = architecture.random(architecture.sizes(layers, width, VOCAB_SIZE), dtype=DTYPES[dtype])
    for name, t in tensors.items():
        if name.endswith(BRANCHES):
            t.mul_(1 / (2 * layers))
    pth = folder / f"{size}-{dtype}.pth"
    torch.save(tensors, pth)
    blocks = sum(t.numel() for name, t in tensors.items() if name.startswith("blocks.") and max(t.shape) < t.numel())
    head = tensors["head.weight"].numel()
    itemsize = DTYPES[dtype].itemsize
    return Checkpoint(size, dtype, pth, (blocks + head) * itemsize, blocks, head)

"""Random inputs of kernels, off the sizes of their tiles, and what the weights among them stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import apart
from rwkv_backends.kernels.tuning import Tuning
from rwkv_layers.linear import Matrix
from rwkv_layers.matrices import quantize
from torch import Tensor

TUNING = Tuning(
    overlap=False,
    programs=3,
    tile_rows=4,
    piece_rows=4,
    lerp_rows=32,
    lerp_cols=32,
    lerp_split=20,
    key_tokens=16,
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
B, C, V, R, D = 2, 40, 37, 5, 9  # C and the rest are no powers of two


class Draw:
    """Random tensors, the same at every run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def matrix(self, rows: int, cols: int) -> Tensor:
        """What makes of numbers of about 1 others of about 1."""
        return (torch.randn((rows, cols), generator=self.generator) / cols**0.5).to(self.dtype)

    def norm(self) -> tuple[Tensor, Tensor]:
        return self(C), self(C)


def stored(weight: Tensor, int8: bool) -> tuple[Matrix, Tensor]:
    """A matrix [D, C], or several, as the model holds it, and what it stands for in float64."""
    if not int8:
        return Matrix(weight, None), weight.double()
    values, scale = quantize(weight.float().flatten(0, -2))
    values, scale = values.view(weight.shape), scale.view(weight.shape[:-1])
    return Matrix(values, scale), values.double() * scale.double().unsqueeze(-1)


def normed(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """Layer norm in float64, rounded as the model keeps it."""
    return F.layer_norm(x.double(), [C], norm[0].double(), norm[1].double()).to(x.dtype).double()


def shifted(x: Tensor, prev: Tensor, T: int) -> Tensor:
    """What each row of [B*T, C] sees of the one before it, minus itself."""
    by_row = x.view(-1, T, C)
    return (torch.cat([prev.double().unsqueeze(1), by_row[:, :-1]], 1) - by_row).view(-1, C)


def close(dtype: torch.dtype, *pairs: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in pairs:
        assert apart(ours, theirs) < TOLERANCE[dtype]

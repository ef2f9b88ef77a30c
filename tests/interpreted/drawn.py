"""Random inputs of kernels, off the sizes of their tiles, and what the weights among them stand for."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from helpers import CPU, apart, tokens_of
from rwkv_backends.eager import Eager
from rwkv_backends.fused import FAMILIES
from rwkv_backends.kernels.tuning import Tuning
from rwkv_layers.linear import Matrix
from rwkv_layers.matrices import quantize
from torch import Tensor

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, ModelConfig
from rwkv_runtime.state import State

TUNING = Tuning(
    overlap=False,
    programs=3,
    tile_rows=4,
    piece_rows=4,
    lerp_rows=32,
    lerp_cols=32,
    lerp_split=20,
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


def assert_close(dtype: torch.dtype, *pairs: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in pairs:
        assert apart(ours, theirs) < TOLERANCE[dtype]


def stepped(
    architecture: Architecture, config: ModelConfig, dtype: str, state: str, quant: str | None, tuning: Tuning
) -> tuple[list[Tensor], list[State], State]:
    """Four tokens of each of five rows through the kernels, and as plain PyTorch has it: logits, states of six rows, of
    which the last is not in use, and what they began as."""
    tensors = architecture.random(config, dtype=getattr(torch, dtype))
    model = build_model(tensors, [architecture], CPU, quant=quant, state_dtype=getattr(torch, state))
    states, logits = [model.new_state(6) for _ in range(2)], []
    passes = import_module(FAMILIES[architecture.name]).forward(model, tuning), Eager().forward(model)
    steps = [torch.tensor([tokens_of(4, row)[t : t + 1] for row in range(5)]) % config.vocab_size for t in range(4)]
    for forward, rows in zip(passes, states, strict=True):
        logits.append(torch.stack([forward(step, rows.view(0, 5)) for step in steps]))
    return logits, states, model.new_state(6)


def near_enough(logits: list[Tensor], states: list[State], begun: State, near: float) -> bool:
    """Whether both of `stepped` say the same, and left the row that was not in use as it was."""
    ours, theirs = states
    return apart(*logits) < near and all(
        apart(tensor.float(), theirs[name].float()) < near and torch.equal(tensor[:, 5], begun[name][:, 5])
        for name, tensor in ours.tensors.items()
    )

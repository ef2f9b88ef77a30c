"""What the layers of all versions have in common.

Annotations here are real types, not strings: torch.jit.script reads them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_layers.shapes import expected_state
from rwkv_runtime import ModelConfig, Place, TensorSpec


class Norm(NamedTuple):
    weight: Tensor  # [C]
    bias: Tensor  # [C]


def shift(x: Tensor, x_prev: Tensor) -> Tensor:
    """Token shift: what each place sees of the one before it, minus itself. [B, T, C], [B, C] -> [B, T, C]."""
    if x.shape[1] == 1:
        return x_prev.unsqueeze(1) - x
    return torch.cat([x_prev.unsqueeze(1), x[:, :-1]], dim=1) - x


def state_spec(config: ModelConfig, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """One row: the last input of both mixings, and the WKV state [H, K, V]."""
    return {
        "att_x_prev": TensorSpec((config.n_embd,), dtype),
        "att_kv": TensorSpec((config.n_head, config.head_size, config.head_size), torch.float32),
        "ffn_x_prev": TensorSpec((config.n_embd,), dtype),
    }


def initial_state(tensors: Mapping[str, Tensor], config: ModelConfig, place: Place) -> dict[str, Tensor]:
    """The WKV states of a state-tuned file, which keeps them as [H, V, K]."""
    shapes = expected_state(config, tensors)
    layers = [place(name, tensors[name].reshape(shape), torch.float32) for name, shape in shapes.items()]
    return {"att_kv": torch.stack(layers).transpose(2, 3).contiguous()} if layers else {}

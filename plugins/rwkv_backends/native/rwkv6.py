"""RWKV-6's weights as rwkv6.c reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_backends.native.prompt6 import TimeMixing6
from rwkv_backends.native.structs import Matrix, Norm, Packer, Weighted
from rwkv_backends.native.team import Team
from rwkv_runtime import Model

if TYPE_CHECKING:
    from rwkv_layers.rwkv6 import Block, Weights

RESCALE_EVERY = 6
"""In float16 the architecture has folded this into its weights."""


class Layer(ctypes.Structure):
    """`struct layer` of rwkv6.c."""

    _fields_ = [
        ("ln1", Norm),
        ("ln2", Norm),
        ("maa_x", ctypes.c_void_p),
        ("maa_w1", Matrix),
        ("maa_w2", Matrix),
        ("maa", ctypes.c_void_p),
        ("decay_w1", Matrix),
        ("decay_w2", Matrix),
        ("decay", ctypes.c_void_p),
        ("bonus", ctypes.c_void_p),
        ("kvrg", Matrix * 4),
        ("ln_x", Norm),
        ("output", Matrix),
        ("ffn_maa_k", ctypes.c_void_p),
        ("ffn_maa_r", ctypes.c_void_p),
        ("key", Matrix),
        ("receptance", Matrix),
        ("value", Matrix),
    ]


SIZES = (Layer, Weighted)
"""As rwkv6_sizes numbers them."""


def pack(model: Model, packer: Packer) -> Weighted:
    """The one place that looks into RWKV-6's weights."""
    w: Weights = model.weights
    config = model.config
    layers = (Layer * config.n_layer)(*(_layer(block, model.dtype, packer) for block in w.blocks))
    return Weighted(
        config.n_layer,
        config.n_head,
        config.head_size,
        RESCALE_EVERY if w.rescaled else 0,
        packer.matrix(w.emb),
        packer.norm(*w.ln0),
        packer.norm(*w.ln_out),
        packer.matrix(*w.head),
        packer.layers(layers),
    )


def layer_weights(model: Model) -> int:
    """How many there are in the large matrices of one layer."""
    C, F = model.config.n_embd, model.config.n_ffn
    return 6 * C * C + 2 * C * F


def prompt_ops(library: ctypes.CDLL, team: Team) -> dict[str, Callable[..., Tensor]]:
    """What takes the place of the architecture's operations."""
    return {"time_mixing": TimeMixing6(library, team)}


def _layer(block: Block, dtype: torch.dtype, packer: Packer) -> Layer:
    att, ffn = block.att, block.ffn

    def adapter(weight: Tensor) -> Matrix:
        """The architecture widens those of a bfloat16 model to float32; as they were they are read twice as fast."""
        return packer.matrix(weight.to(dtype) if dtype == torch.bfloat16 else weight)

    R = att.maa_w2.shape[1] - 1
    return Layer(
        packer.norm(*block.ln1),
        packer.norm(*block.ln2),
        packer.vector(att.maa_x),
        adapter(att.maa_w1),
        adapter(att.maa_w2[:, :R].flatten(0, 1)),
        packer.vector(att.maa_w2[:, R]),
        adapter(att.decay_w1),
        adapter(att.decay_w2),
        packer.vector(att.decay),
        packer.vector(att.bonus),
        (Matrix * 4)(*packer.matrices(*att.kvrg)),
        packer.norm(att.ln_x_weight, att.ln_x_bias),
        packer.matrix(*att.output),
        packer.vector(ffn.maa_k),
        packer.vector(ffn.maa_r),
        packer.matrix(*ffn.key),
        packer.matrix(*ffn.receptance),
        packer.matrix(*ffn.value),
    )

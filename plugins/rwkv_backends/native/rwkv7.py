"""RWKV-7's weights as rwkv7.c reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from rwkv_backends.native.structs import Matrix, Norm, Packer, Weighted
from rwkv_backends.native.team import Team
from rwkv_runtime import Model

if TYPE_CHECKING:
    from rwkv_layers.rwkv7 import Block, Weights


class Layer(ctypes.Structure):
    """`struct layer` of rwkv7.c."""

    _fields_ = [
        ("ln1", Norm),
        ("ln2", Norm),
        ("shift", ctypes.c_void_p),
        ("down", Matrix * 4),
        ("up", Matrix * 4),
        ("base", ctypes.c_void_p * 3),
        ("removal", ctypes.c_void_p),
        ("replacement", ctypes.c_void_p),
        ("bonus", ctypes.c_void_p),
        ("rkv", Matrix * 3),
        ("ln_x", Norm),
        ("output", Matrix),
        ("ffn_shift", ctypes.c_void_p),
        ("key", Matrix),
        ("value", Matrix),
    ]


SIZES = (Layer, Weighted)
"""As rwkv7_sizes numbers them."""


def pack(model: Model, packer: Packer) -> Weighted:
    """The one place that looks into RWKV-7's weights."""
    w: Weights = model.weights
    config = model.config
    layers = (Layer * config.n_layer)(*(_layer(block, packer) for block in w.blocks))
    return Weighted(
        config.n_layer,
        config.n_head,
        config.head_size,
        0,
        packer.matrix(w.emb),
        packer.norm(*w.ln0),
        packer.norm(*w.ln_out),
        packer.matrix(*w.head),
        packer.layers(layers),
    )


def layer_weights(model: Model) -> int:
    """How many there are in the large matrices of one layer."""
    C, F = model.config.n_embd, model.config.n_ffn
    return 4 * C * C + 2 * C * F


def prompt_ops(library: ctypes.CDLL, team: Team) -> dict[str, Callable[..., Tensor]]:
    """What takes the place of the architecture's operations: nothing."""
    return {}


def _layer(block: Block, packer: Packer) -> Layer:
    att, ffn = block.att, block.ffn
    adapters = (att.decay, att.rate, att.value_mix)
    downs = [Matrix() if adapter is None else packer.matrix(adapter.down) for adapter in adapters]
    ups = [Matrix() if adapter is None else packer.matrix(adapter.up) for adapter in adapters]
    bases = [None if adapter is None else packer.vector(adapter.base) for adapter in adapters]
    return Layer(
        packer.norm(*block.ln1),
        packer.norm(*block.ln2),
        packer.vector(att.shift),
        (Matrix * 4)(*downs, packer.matrix(att.gate_down)),
        (Matrix * 4)(*ups, packer.matrix(att.gate_up)),
        (ctypes.c_void_p * 3)(*bases),
        packer.vector(att.removal),
        packer.vector(att.replacement),
        packer.vector(att.bonus),
        (Matrix * 3)(*packer.matrices(*att.rkv)),
        packer.norm(att.ln_x_weight, att.ln_x_bias),
        packer.matrix(*att.output),
        packer.vector(ffn.shift),
        packer.matrix(*ffn.key),
        packer.matrix(*ffn.value),
    )

"""RWKV-7's layers for the many tokens of a prompt: products by cuBLAS, and kernels for what is between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rwkv_layers.linear import linear
from torch import Tensor

from rwkv_backends.kernels import mixing, spans7, tokens
from rwkv_backends.kernels.batch6 import add_product
from rwkv_backends.kernels.batch7 import Layer, products
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.tokens import Shift
from rwkv_backends.kernels.tuning import Tuning
from rwkv_runtime import State


def read(
    x: Tensor, state: State, layers: Sequence[Layer], beside: Beside, tuning: Tuning, length: Tensor | None = None
) -> Tensor:
    """x [B*T, C] through all layers, in place.

    The state is updated in place: what the next token is shifted from at the end of all, so that kernels of first
    tokens may read what those of last ones would write. `length`: see `Padded`.
    """
    att_x, ffn_x = state["att_x_prev"], state["ffn_x_prev"]
    att_last, ffn_last = torch.empty_like(att_x), torch.empty_like(ffn_x)
    first: Tensor | None = None  # the values of the first layer [B*T, C]
    for i, layer in enumerate(layers):
        ffn = layer.block.ffn
        to = Shift(att_x[i], layer.block.ln1, layer.mu.unbind(0), att_last[i], length)
        mixed = tokens.shift(x, to, tuning)
        rkv, raw = products(mixed, layer, beside, tuning)
        out = spans7.wkv(rkv, raw, layer.heads, first, state["att_kv"][i], x, tuning, length)
        first = rkv[2] if first is None else first
        add_product(out, layer.block.att.output, x)
        key = tokens.shift(x, Shift(ffn_x[i], layer.block.ln2, (ffn.shift,), ffn_last[i], length), tuning)[0]
        add_product(mixing.relu_squared(linear(key, ffn.key), tuning), ffn.value, x)
    att_x.copy_(att_last)
    ffn_x.copy_(ffn_last)
    return x

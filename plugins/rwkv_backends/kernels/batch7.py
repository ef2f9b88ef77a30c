"""RWKV-7's layers for one token of each of many rows: cuBLAS's products, the adapters' beside larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rwkv_layers.linear import Matrix, linear, linears
from rwkv_layers.parts import Norm
from rwkv_layers.rwkv7 import Block
from torch import Tensor

from rwkv_backends.kernels import adapters7, batch, mixing, wkv7
from rwkv_backends.kernels.adapters7 import Adapters
from rwkv_backends.kernels.batch6 import add_product
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.wkv7 import Heads
from rwkv_runtime import State


class Layer(NamedTuple):
    """What the kernels read of one layer."""

    block: Block
    mu: Tensor  # [6, C]: r, k, v, a, w, g
    adapters: Adapters
    heads: Heads
    tiles: Tensor  # of the adapters, for few rows
    value: Matrix  # [F, C]: the value matrix turned round, so that an input that is zero skips a row of it


def step(x: Tensor, state: State, layers: Sequence[Layer], ln_out: Norm, beside: Beside, tuning: Tuning) -> Tensor:
    """x [B, C] through all layers -> what the head reads [B, C]. The state is updated in place."""
    first: Tensor | None = None  # the values of the first layer [B, C]
    for i, layer in enumerate(layers):
        att, ffn = layer.block.att, layer.block.ffn
        mixed = batch.shift(x, None, state["att_x_prev"][i], layer.block.ln1, layer.mu.unbind(0), tuning)
        rkv, raw = products(mixed, layer, beside, tuning)
        out = wkv7.rows(rkv, raw, layer.heads, first, state["att_kv"][i], x, tuning.alone)
        first = rkv[2] if first is None else first
        add_product(out, att.output, x)
        key = batch.shift(x, None, state["ffn_x_prev"][i], layer.block.ln2, (ffn.shift,), tuning)[0]
        add_product(mixing.relu_squared(linear(key, ffn.key), tuning), ffn.value, x)
    return batch.end(x, None, 1.0, ln_out, tuning)


def products(mixed: Tensor, layer: Layer, beside: Beside, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """mixed [6, M, C] -> receptance, key and value [3, M, C], and what the layer's n adapters give [n, M, C]."""
    down, up, _ = layer.adapters
    n, R, C = down.shape
    M = mixed.shape[1]
    low, raw = mixed.new_empty(n, M, R), mixed.new_empty(n, M, C)
    beside.fork()
    rkv = linears(mixed[:3], layer.block.att.rkv)
    with beside.work():
        torch.bmm(mixed[-n:], down.transpose(1, 2), out=low)
        adapters7.activate(low, tuning)
        torch.bmm(low, up.transpose(1, 2), out=raw)
    beside.join()
    return rkv, raw

"""RWKV-6's layers for one token of each of many rows: cuBLAS's products, two small ones of them beside large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rwkv_layers.linear import Matrix, dense, linear, linears
from rwkv_layers.parts import Norm
from rwkv_layers.rwkv6 import Block, ChannelMixing, TimeMixing
from torch import Tensor

from rwkv_backends.deferred import DeferredState
from rwkv_backends.kernels import batch, deferred6, mixing, wkv6
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.tuning import Tuning
from rwkv_runtime import State

Gated = tuple[Tensor, Tensor]
"""Receptance [B, C] and value [1, B, C], of which the next kernel makes what the residual stream gains."""


def step(
    x: Tensor, state: State, layers: Sequence[tuple[Block, float]], ln_out: Norm, beside: Beside, tuning: Tuning
) -> Tensor:
    """x [B, C] through all layers, each with what x is scaled by after it -> what the head reads [B, C].

    The state is updated in place.
    """
    gated: Gated | None = None
    before = 1.0
    for i, (block, scale) in enumerate(layers):
        ln1, att, ln2, ffn = block
        prev = state["att_x_prev"][i]
        dx, first = batch.begin(x, gated, before, prev, ln1, att.maa_x, tuning.alone if gated else tuning)
        lora = dense(first.to(att.maa_w1.dtype), att.maa_w1)  # on a CPU the adapters are float32
        mixed = batch.mixtures(lora.unsqueeze(0), prev, dx, att.maa_w2, tuning)
        add_product(_wkv(mixed, x, state, i, att, beside, tuning), att.output, x)
        maa = ffn.maa_k, ffn.maa_r
        key, receptance = batch.shift(x, None, state["ffn_x_prev"][i], ln2, maa, tuning)
        gated, before = _channel_mixing(key, receptance, ffn, beside, tuning), scale
    assert gated
    return batch.end(x, gated, before, ln_out, tuning.alone)


def _wkv(mixed: Tensor, x: Tensor, state: State, i: int, att: TimeMixing, beside: Beside, tuning: Tuning) -> Tensor:
    """mixed [5, B, C] -> what the output matrix reads [B, C], of the dtype of x; the state of layer i in place."""
    inputs = mixed[0].to(att.decay_w1.dtype)
    low = inputs.new_empty(len(inputs), len(att.decay_w1))
    decays = torch.empty(x.shape, device=x.device) if isinstance(state, DeferredState) else None
    beside.fork()
    kvrg = linears(mixed[1:], att.kvrg)
    with beside.work():
        torch.mm(inputs, att.decay_w1.t(), out=low)
        if decays is not None:
            deferred6.decays(low, att.decay_w2, att.decay, decays, tuning.alone)
    beside.join()
    return wkv6.of_layer(kvrg, low, att, state, i, x, tuning.alone, decays)


def _channel_mixing(key: Tensor, receptance: Tensor, ffn: ChannelMixing, beside: Beside, tuning: Tuning) -> Gated:
    """Of the inputs of both matrices [B, C]."""
    r = torch.empty_like(receptance)
    beside.fork()
    k = linear(key, ffn.key)
    with beside.work():
        if ffn.receptance.scale is None:
            torch.mm(receptance, ffn.receptance.weight.t(), out=r)
        else:
            r.copy_(linear(receptance, ffn.receptance))
    v = linear(mixing.relu_squared(k, tuning), ffn.value)
    beside.join()
    return r, v.unsqueeze(0)


def add_product(y: Tensor, matrix: Matrix, x: Tensor) -> None:
    """x += y W^T: y, x [M, C]."""
    if matrix.scale is None:
        x.addmm_(y, matrix.weight.t())
    else:
        x.add_(linear(y, matrix))

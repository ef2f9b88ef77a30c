"""RWKV-6's layers for one token of each of some rows, more than two: nine kernels a layer, each begun early."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rwkv_layers.linear import Matrix
from rwkv_layers.parts import Norm
from rwkv_layers.rwkv6 import Block
from torch import Tensor

from rwkv_backends.kernels import batch, skinny, wkv6
from rwkv_backends.kernels.tuning import Tuning
from rwkv_runtime import State


def step(x: Tensor, state: State, layers: Sequence[tuple[Block, float]], ln_out: Norm, tuning: Tuning) -> Tensor:
    """x [B, C] through all layers, each with what x is scaled by after it -> what the head reads [B, C].

    The state is updated in place.
    """
    gated: tuple[Tensor, Tensor] | None = None
    before = 1.0
    for i, ((ln1, att, ln2, ffn), scale) in enumerate(layers):
        prev = state["att_x_prev"][i]
        dx, first = batch.begin(x, gated, before, prev, ln1, att.maa_x, tuning)
        lora = skinny.parts(first, Matrix(att.maa_w1, None), tuning)
        mixed = batch.mixtures(lora, prev, dx, att.maa_w2, tuning)
        decay = Matrix(att.decay_w1, None)
        kvrg, low = skinny.pair(mixed[1:], att.kvrg, "", mixed[0], decay, torch.float32, tuning)
        out = wkv6.of_layer(kvrg, low, att, state, i, x, tuning)
        gain = skinny.parts(out, att.output, tuning)
        maa = ffn.maa_k, ffn.maa_r
        key, receptance = batch.shift(x, gain, state["ffn_x_prev"][i], ln2, maa, tuning)
        k, r = skinny.pair(key.unsqueeze(0), ffn.key, "square", receptance, ffn.receptance, x.dtype, tuning)
        gated, before = (r, skinny.parts(k[0], ffn.value, tuning)), scale
    assert gated
    return batch.end(x, gated, before, ln_out, tuning)

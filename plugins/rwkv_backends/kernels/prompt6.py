"""RWKV-6's layers for the many tokens of a prompt: products by cuBLAS, and kernels for what is between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rwkv_layers.linear import dense, linear, linears
from rwkv_layers.rwkv6 import Block
from torch import Tensor

from rwkv_backends.kernels import mixing, spans6, tokens
from rwkv_backends.kernels.batch6 import add_product
from rwkv_backends.kernels.tokens import Shift
from rwkv_backends.kernels.tuning import Tuning
from rwkv_runtime import State


def read(
    x: Tensor,
    state: State,
    layers: Sequence[tuple[Block, float]],
    tuning: Tuning,
    length: Tensor | None = None,
) -> Tensor:
    """x [B*T, C] -> the same after all layers, each with what x is scaled by after it.

    The state is updated in place: what the next token is shifted from at the end of all, so that kernels of first
    tokens may read what those of last ones would write. `length`: see `Padded`.
    """
    att_x, ffn_x = state["att_x_prev"], state["ffn_x_prev"]
    att_last, ffn_last = torch.empty_like(att_x), torch.empty_like(ffn_x)

    def first_shift(i: int) -> Shift:
        block = layers[i][0]
        return Shift(att_x[i], block.ln1, (None, block.att.maa_x), att_last[i], length)

    normed, first = tokens.shift(x, first_shift(0), tuning)
    for i, (block, scale) in enumerate(layers):
        ffn = block.ffn
        _time_mixing(x, normed, first, att_x[i], state["att_kv"][i], block, tuning, length)
        to = Shift(ffn_x[i], block.ln2, (ffn.maa_k, ffn.maa_r), ffn_last[i], length)
        key, receptance = tokens.shift(x, to, tuning)
        r = linear(receptance, ffn.receptance)
        v = linear(mixing.relu_squared(linear(key, ffn.key), tuning), ffn.value)
        if i + 1 < len(layers):
            x, (normed, first) = tokens.gate_shift(r, v, x, scale, first_shift(i + 1), tuning)
        else:
            x = tokens.gate(r, v, x, scale, tuning)
    att_x.copy_(att_last)
    ffn_x.copy_(ffn_last)
    return x


def _time_mixing(
    x: Tensor,
    normed: Tensor,
    first: Tensor,
    prev: Tensor,
    kv: Tensor,
    block: Block,
    tuning: Tuning,
    length: Tensor | None,
) -> None:
    """x [B*T, C] and kv [B, H, N, N] are updated in place; normed and first are what `tokens.shift` made of x."""
    att = block.att
    T = len(x) // len(prev)
    lora = dense(first.to(att.maa_w1.dtype), att.maa_w1)  # on a CPU the adapters are float32
    mixed = mixing.lerps(lora, normed, att.maa_w2, prev, T, tuning)
    low = dense(mixed[0].to(att.decay_w1.dtype), att.decay_w1)
    kvrg = linears(mixed[1:], att.kvrg)
    norm = att.ln_x_weight, att.ln_x_bias
    out = spans6.wkv(kvrg, low, att.decay_w2, att.decay, att.bonus, norm, kv, x, tuning, length)
    add_product(out, att.output, x)

"""RWKV-7's forward pass in kernels: five a layer for a token of few rows, products by cuBLAS for many."""

from __future__ import annotations

import torch
from rwkv_layers.linear import Matrix, linear
from rwkv_layers.rwkv7 import TimeMixing, Weights
from torch import Tensor

from rwkv_backends.kernels import adapters7, batch7, mixing, prompt7, vector, vector7, wkv7
from rwkv_backends.kernels.batch7 import Layer
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.ffn import channel_mixing
from rwkv_backends.kernels.tokens import last_normed
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.widen import Widened
from rwkv_backends.kernels.wkv7 import Heads
from rwkv_backends.prompts import Padded
from rwkv_runtime import Model, State

ALIGNED = 16
"""Ranks are multiples of so many numbers, as cuBLAS and its tiles want them."""


def pack(weights: Weights, tuning: Tuning) -> list[Layer]:
    """The one place where weights are put into the form that kernels read. Value matrices and adapters are copied."""
    layers = []
    for block in weights.blocks:
        value, scale = block.ffn.value
        turned = value.t().contiguous() if tuning.vector_rows else value.t()
        r, w, k, v, a, g = block.att.shift.flatten(0, -2)
        mu = torch.stack([r, k, v, a, w, g])
        adapters = adapters7.pack(block.att, max(ALIGNED, vector7.tile_rows(mu.shape[1], tuning)))
        tiles = vector7.tiles_of(adapters, tuning)
        layers.append(Layer(block, mu, adapters, _heads(block.att), tiles, Matrix(turned, scale)))
    return layers


def _heads(att: TimeMixing) -> Heads:
    norm = (t.view(att.bonus.shape) for t in (att.ln_x_weight, att.ln_x_bias))
    base = att.value_mix.base if att.value_mix else None
    return Heads(att.decay.base, att.rate.base, base, att.removal, att.replacement, att.bonus, *norm)


def forward(model: Model, tuning: Tuning) -> Padded:
    """The forward pass of a model; see `Forward` and `Padded` for what it takes."""
    weights: Weights = model.weights
    layers = pack(weights, tuning)
    second = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def run(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        B, T = tokens.shape
        with torch.cuda.device_of(tokens):
            x = mixing.embed(tokens.flatten().contiguous(), weights.emb, weights.ln0, tuning)
            if T > 1:
                x = prompt7.read(x, state, layers, Beside(second), tuning, length).view(B, T, -1)
                return linear(last_normed(x, weights.ln_out, every, length, tuning), weights.head)
            if tuning.vector_rows >= B:
                _few(x, state, layers, tuning)
                logits = vector.head(x, weights.ln_out, weights.head, tuning)
            else:
                logits = linear(batch7.step(x, state, layers, weights.ln_out, Beside(second), tuning), weights.head)
            return logits.unsqueeze(1) if every else logits

    return Widened(run)


def _few(x: Tensor, state: State, layers: list[Layer], tuning: Tuning) -> None:
    """One token of each row: x [B, C] and the state are updated in place."""
    first: Tensor | None = None  # the values of the first layer [B, C]
    for i, (block, mu, adapters, heads, tiles, value) in enumerate(layers):
        att, ffn, prev = block.att, block.ffn, state["att_x_prev"][i]
        normed, rkv, low = vector7.rkv(x, prev, block.ln1, mu, att.rkv, adapters.down, tiles, tuning)
        out = wkv7.few(rkv, low, adapters, heads, first, state["att_kv"][i], normed, prev, tuning)
        first = rkv[2] if first is None else first
        vector.add_product(out, att.output, x, tuning)
        shift = (ffn.shift, None)
        channel_mixing(x, state["ffn_x_prev"][i], block.ln2, shift, ffn.key, None, value, 1.0, tuning)

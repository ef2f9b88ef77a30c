"""RWKV-7's forward pass in kernels: five a layer for a token of few rows, products by cuBLAS for many."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from rwkv_layers.linear import Matrix, linear
from rwkv_layers.rwkv7 import Adapter, Block, TimeMixing, Weights
from torch import Tensor

from rwkv_backends.kernels import chunk7, mixing, vector, vector7, wkv7
from rwkv_backends.kernels.ffn import channel_mixing
from rwkv_backends.kernels.rows import Rows
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.wkv7 import Heads, Ups
from rwkv_runtime import Forward, Model, State


class Layer(NamedTuple):
    """What the kernels read of one layer."""

    block: Block
    mu: Tensor  # [6, C]: r, w, k, v, a, g
    down: Tensor  # [D, C]: the first halves of the adapters, each padded to whole tiles
    which: Tensor  # int32 [tiles]: the row of mu that each tile's input is mixed by
    ups: Ups
    heads: Heads
    value: Matrix  # [F, C]: the value matrix turned round, so that an input that is zero skips a row of it


def pack(weights: Weights, tuning: Tuning) -> list[Layer]:
    """The one place where weights are put into the form that kernels read. The value matrices are copied."""
    layers = []
    for block in weights.blocks:
        value, scale = block.ffn.value
        turned = value.t().contiguous() if tuning.vector_rows else value.t()
        mu = block.att.shift.flatten(0, -2)
        layers.append(Layer(block, mu, *_adapters(block.att, tuning), _heads(block.att), Matrix(turned, scale)))
    return layers


def _adapters(att: TimeMixing, tuning: Tuning) -> tuple[Tensor, Tensor, Ups]:
    none = att.decay.down.new_empty(0, att.decay.down.shape[1])
    downs = [att.decay.down, att.rate.down, att.value_mix.down if att.value_mix else none, att.gate_down]
    rows = Rows(none.shape[1], none.shape[1], tuning).tile_rows()
    padded = [F.pad(down, [0, 0, 0, -len(down) % rows]) for down in downs]
    tiles = [len(down) // rows for down in padded]
    which = torch.tensor([1, 4, 3, 5], dtype=torch.int32).repeat_interleave(torch.tensor(tiles)).to(none.device)
    places = (len(padded[0]), sum(map(len, padded[:2])), sum(map(len, padded[:3])))
    ups = Ups(att.decay.up, att.rate.up, att.value_mix.up if att.value_mix else None, att.gate_up, places)
    return torch.cat(padded), which, ups


def _heads(att: TimeMixing) -> Heads:
    mix: Adapter | None = att.value_mix
    norm = (t.view(att.bonus.shape) for t in (att.ln_x_weight, att.ln_x_bias))
    base = mix.base if mix else None
    return Heads(att.decay.base, att.rate.base, base, att.removal, att.replacement, att.bonus, *norm)


def forward(model: Model, tuning: Tuning) -> Forward:
    """The forward pass of a model; see `Forward` for what it takes."""
    weights: Weights = model.weights
    layers = pack(weights, tuning)

    def run(tokens: Tensor, state: State, every: bool = False) -> Tensor:
        B, T = tokens.shape
        with torch.cuda.device_of(tokens):
            x = mixing.embed(tokens.flatten().contiguous(), weights.emb, weights.ln0, tuning)
            few = T == 1 and tuning.vector_rows >= B
            layer = _few if few else _many
            first = torch.empty_like(x, dtype=torch.float32)  # the values of the first layer
            for i, weight in enumerate(layers):
                layer(x, state["att_x_prev"][i], state["att_kv"][i], state["ffn_x_prev"][i], first, weight, tuning)
            if few:
                logits = vector.head(x, weights.ln_out, weights.head, tuning)
                return logits.unsqueeze(1) if every else logits
            x = x.view(B, T, -1)
            x = x if every else x[:, -1]
            return linear(F.layer_norm(x, x.shape[-1:], *weights.ln_out), weights.head).float()

    return run


def _few(x: Tensor, att_x: Tensor, att_kv: Tensor, ffn_x: Tensor, first: Tensor, layer: Layer, tuning: Tuning) -> None:
    """One token of each row: x [B, C] and the state of the layer are updated in place."""
    att, ffn = layer.block.att, layer.block.ffn
    matrices = att.receptance, att.key, att.value
    normed, rkv, low = vector7.rkv(x, att_x, layer.block.ln1, layer.mu, matrices, layer.down, layer.which, tuning)
    out = wkv7.step(rkv, low, layer.ups, layer.heads, first, att_kv, x, tuning, (normed, att_x))
    vector.add_product(out, att.output, x, tuning)
    channel_mixing(x, ffn_x, layer.block.ln2, (ffn.shift, None), ffn.key, None, layer.value, 1.0, tuning)


def _many(x: Tensor, att_x: Tensor, att_kv: Tensor, ffn_x: Tensor, first: Tensor, layer: Layer, tuning: Tuning) -> None:
    """Any number of rows and tokens: x [B*T, C] and the state of the layer are updated in place."""
    att, ffn, ups = layer.block.att, layer.block.ffn, layer.ups
    T = len(x) // len(att_x)
    mixed, last = mixing.shift_six(x, att_x, layer.block.ln1, layer.mu, T)
    att_x.copy_(last)
    r, k, v = linear(mixed[0], att.receptance), linear(mixed[2], att.key), linear(mixed[3], att.value)
    ends = (*ups.places, len(layer.down))
    starts = (0, *ups.places)
    low = [F.linear(mixed[i], layer.down[a:b]) for i, a, b in zip((1, 4, 3, 5), starts, ends, strict=True)]
    if T == 1:
        rkv = torch.stack([r, k, v])
        out = wkv7.step(rkv, torch.cat(low, 1), ups, layer.heads, first, att_kv, x, tuning)
    else:
        decay, rate, value, gate = (
            t[:, : 0 if up is None else up.shape[1]] for t, up in zip(low, ups[:4], strict=True)
        )
        mix = None if ups.value is None else F.linear(value, ups.value)
        raw = F.linear(torch.tanh(decay), ups.decay), F.linear(rate, ups.rate), mix
        w, k, v, a, b = wkv7.prepare(k, v, raw, layer.heads, first)
        # The chunks write over k; the bonus needs it as it is.
        out = chunk7.wkv_chunked(r, w, k.clone(), v, a, b, att_kv, tuning)
        out = wkv7.finish(out, r, k, v, F.linear(torch.sigmoid(gate), ups.gate), layer.heads)
    if att.output.scale is None:
        x.addmm_(out, att.output.weight.t())
    else:
        x.add_(linear(out, att.output))
    key, last = mixing.shift_one(x, ffn_x, layer.block.ln2, ffn.shift, T)
    mixing.add(linear(mixing.relu_squared(linear(key, ffn.key), tuning), ffn.value), last, x, ffn_x, T)

"""RWKV-6's forward pass in kernels: about seven a layer for a token of few rows, products by cuBLAS for many."""

from __future__ import annotations

from typing import NamedTuple

import torch
from rwkv_layers.linear import Matrix, linear
from rwkv_layers.rwkv6 import RESCALE_EVERY, Block, Weights
from torch import Tensor

from rwkv_backends.deferred import DeferredState
from rwkv_backends.kernels import batch6, deferred6, mixing, prompt6, skinny6, vector, wkv6
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.ffn import channel_mixing
from rwkv_backends.kernels.tokens import last_normed
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.widen import Widened
from rwkv_backends.prompts import Padded
from rwkv_runtime import Model, State


class Layer(NamedTuple):
    """What the kernels read of one layer."""

    block: Block
    value: Matrix  # [F, C]: the value matrix turned round, so that an input that is zero skips a row of it
    scale: float  # of the residual stream after this layer


def pack(weights: Weights, tuning: Tuning) -> list[Layer]:
    """The one place where weights are put into the form that kernels read. The value matrices are copied."""
    layers = []
    for i, block in enumerate(weights.blocks):
        halved = weights.rescaled and (i + 1) % RESCALE_EVERY == 0
        value, scale = block.ffn.value
        turned = value.t().contiguous() if tuning.vector_rows else value.t()
        layers.append(Layer(block, Matrix(turned, scale), 0.5 if halved else 1.0))
    return layers


def forward(model: Model, tuning: Tuning) -> Padded:
    """The forward pass of a model; see `Forward` and `Padded` for what it takes."""
    weights: Weights = model.weights
    layers = pack(weights, tuning)
    blocks = [(layer.block, layer.scale) for layer in layers]
    second = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def run(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        B, T = tokens.shape
        with torch.cuda.device_of(tokens):
            x = mixing.embed(tokens.flatten().contiguous(), weights.emb, weights.ln0, tuning)
            if T > 1:
                if isinstance(state, DeferredState):
                    state.settle()
                x = prompt6.read(x, state, blocks, tuning, length).view(B, T, -1)
                return linear(last_normed(x, weights.ln_out, every, length, tuning), weights.head)
            if isinstance(state, DeferredState):
                deferred6.merge(state, tuning)
            if tuning.vector_rows >= B:
                # One layer of a state is contiguous, whichever of its rows a view has; the engine moves rows so that
                # those at work are always the first: no kernel needs to be told which they are.
                for i, layer in enumerate(layers):
                    _few(x, state, i, layer, tuning)
                logits = vector.head(x, weights.ln_out, weights.head, tuning)
            elif tuning.skinny_rows >= B and x.element_size() == 2:
                logits = linear(skinny6.step(x, state, blocks, weights.ln_out, tuning), weights.head)
            else:
                logits = linear(batch6.step(x, state, blocks, weights.ln_out, Beside(second), tuning), weights.head)
            return logits.unsqueeze(1) if every else logits

    return Widened(run)


def _few(x: Tensor, state: State, i: int, layer: Layer, tuning: Tuning) -> None:
    """One token of each row: x [B, C] and the state of layer i are updated in place."""
    att, ffn, att_x = layer.block.att, layer.block.ffn, state["att_x_prev"][i]
    normed, dx, lora = vector.shift_lora(x, att_x, layer.block.ln1, att.maa_x, att.maa_w1, tuning)
    mixed = vector.lerps(lora, normed, dx, att.maa_w2, att_x, tuning)
    kvrg, low = vector.kvrg(mixed, att.kvrg, att.decay_w1, tuning)
    out = wkv6.of_layer(kvrg, low, att, state, i, x, tuning)
    vector.add_product(out, att.output, x, tuning)
    maa, matrices = (ffn.maa_k, ffn.maa_r), (ffn.key, ffn.receptance, layer.value)
    channel_mixing(x, state["ffn_x_prev"][i], layer.block.ln2, maa, *matrices, layer.scale, tuning)

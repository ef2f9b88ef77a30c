"""RWKV-7 (x070): checkpoint names, sizes and forward pass.

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456.
Annotations here are real types, not strings: torch.jit.script reads them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_layers import parts, rwkv7_reference
from rwkv_layers.linear import Matrix, linear, linears
from rwkv_layers.matrices import QUANTIZATIONS, matrix, stacked
from rwkv_layers.parts import Norm, shift
from rwkv_layers.rwkv7_shapes import config_of, expected_shapes, usual_sizes
from rwkv_layers.shapes import why_not
from rwkv_layers.wkv7 import wkv_chunked, wkv_step
from rwkv_runtime import Architecture, ModelConfig, Place, State, TensorSpec, hookimpl


class Adapter(NamedTuple):
    """base + up(down(x)), of rank R."""

    base: Tensor  # [C] float32
    down: Tensor  # [R, C]
    up: Tensor  # [C, R]


class TimeMixing(NamedTuple):
    shift: Tensor  # [6, 1, 1, C]: r, w, k, v, a, g
    decay: Adapter
    rate: Adapter
    value_mix: Adapter | None  # None in the first layer
    gate_down: Tensor  # [R, C]
    gate_up: Tensor  # [C, R]
    removal: Tensor  # [H, N] float32: k_k, from keys to what is taken out of the state
    replacement: Tensor  # [H, N] float32: k_a, how far a key's strength follows the rate
    bonus: Tensor  # [H, N] float32: r_k
    rkv: Matrix  # [3, C, C]: receptance, key, value
    output: Matrix  # [C, C]
    ln_x_weight: Tensor  # [C] float32
    ln_x_bias: Tensor  # [C] float32


class ChannelMixing(NamedTuple):
    shift: Tensor  # [C]
    key: Matrix  # [F, C]
    value: Matrix  # [C, F]


class Block(NamedTuple):
    ln1: Norm
    att: TimeMixing
    ln2: Norm
    ffn: ChannelMixing


class Weights(NamedTuple):
    emb: Tensor  # [V, C]
    ln0: Norm  # not folded into emb: that would take a copy of it, and emb stays mapped from the file
    blocks: tuple[Block, ...]
    ln_out: Norm
    head: Matrix  # [V, C]


def time_mixing(
    x: Tensor,
    x_prev: Tensor,
    kv: Tensor,
    v_first: Tensor | None,
    w: TimeMixing,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, C], x_prev [B, C], kv float32 [B, H, K, V], v_first float32 [B, T, H, N], None in the first layer.

    Returns output [B, T, C], next x_prev, next kv, v_first. What lies between the matrix products is float32.
    """
    B, T, C = x.shape
    H, N = w.bonus.shape
    xr, xw, xk, xv, xa, xg = torch.addcmul(x, shift(x, x_prev), w.shift).unbind(0)
    r, k, v = linears(torch.stack([xr, xk, xv]).flatten(1, 2), w.rkv).float().view(3, B, T, H, N).unbind(0)
    raw = w.decay.base + F.linear(torch.tanh(F.linear(xw, w.decay.down)), w.decay.up).float()
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(raw)).view(B, T, H, N)
    rate = torch.sigmoid(w.rate.base + F.linear(F.linear(xa, w.rate.down), w.rate.up).float()).view(B, T, H, N)
    gate = F.linear(torch.sigmoid(F.linear(xg, w.gate_down)), w.gate_up)
    mix = w.value_mix
    if v_first is None or mix is None:
        v_first = v
    else:
        share = torch.sigmoid(mix.base + F.linear(F.linear(xv, mix.down), mix.up).float()).view(B, T, H, N)
        v = torch.lerp(v, v_first, share)
    kappa = F.normalize(k * w.removal, dim=-1)
    k = k * (1.0 + (rate - 1.0) * w.replacement)
    if T == 1:
        out, kv = wkv_step(r, decay, k, v, -kappa, kappa * rate, kv)
    else:
        out, kv = wkv_chunked(r, decay, k, v, -kappa, kappa * rate, kv)
    out = F.group_norm(out.reshape(B * T, C), H, w.ln_x_weight, w.ln_x_bias, eps=64e-5)
    out = out.view(B, T, H, N) + (r * k * w.bonus).sum(-1, keepdim=True) * v
    return linear(out.view(B, T, C).to(x.dtype) * gate, w.output), x[:, -1], kv, v_first


def channel_mixing(x: Tensor, x_prev: Tensor, w: ChannelMixing) -> tuple[Tensor, Tensor]:
    """x [B, T, C], x_prev [B, C] -> output [B, T, C], next x_prev."""
    k = torch.relu(linear(torch.addcmul(x, shift(x, x_prev), w.shift), w.key)) ** 2
    return linear(k, w.value), x[:, -1]


class RWKV7(Architecture):
    name = "rwkv7"
    summary = "RWKV-7 (x070, Goose)"
    ops = {"time_mixing": time_mixing, "channel_mixing": channel_mixing}
    quantizations = QUANTIZATIONS
    rounded = ("att_kv",)

    def why_not(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return why_not(shapes, "RWKV-7", ".att.r_k")

    def config(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        return config_of(shapes)

    def weights(self, tensors: Mapping[str, Tensor], config: ModelConfig, place: Place, dtype: torch.dtype) -> Weights:
        tensors = {name: tensors[name].reshape(shape) for name, shape in expected_shapes(config).items()}

        def norm(name: str) -> Norm:
            return Norm(*(place(f"{name}.{part}", tensors[f"{name}.{part}"]) for part in ("weight", "bias")))

        emb = place("emb.weight", tensors["emb.weight"])
        blocks = []
        for i in range(config.n_layer):
            att = _time_mixing_weights(tensors, f"blocks.{i}.att.", config, place)
            prefix = f"blocks.{i}.ffn."
            key, value = (matrix(place, tensors, f"{prefix}{part}.weight") for part in ("key", "value"))
            ffn = ChannelMixing(place(f"{prefix}x_k", tensors[f"{prefix}x_k"]), key, value)
            blocks.append(Block(norm(f"blocks.{i}.ln1"), att, norm(f"blocks.{i}.ln2"), ffn))
        head = matrix(place, tensors, "head.weight")
        return Weights(emb, norm("blocks.0.ln0"), tuple(blocks), norm("ln_out"), head)

    def state_spec(self, config: ModelConfig, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return parts.state_spec(config, dtype)

    def initial_state(self, tensors: Mapping[str, Tensor], config: ModelConfig, place: Place) -> dict[str, Tensor]:
        return parts.initial_state(tensors, config, place)

    def forward(
        self,
        ops: Mapping[str, Callable[..., Any]],
        weights: Weights,
        tokens: Tensor,
        state: State,
        every: bool = False,
    ) -> Tensor:
        time_mixing, channel_mixing = ops["time_mixing"], ops["channel_mixing"]
        x = F.embedding(tokens, weights.emb)  # [B, T, C]
        size = x.shape[-1:]
        x = F.layer_norm(x, size, *weights.ln0)
        v_first = None
        for i, block in enumerate(weights.blocks):
            att_x, att_kv, ffn_x = state["att_x_prev"][i], state["att_kv"][i], state["ffn_x_prev"][i]
            x_att = F.layer_norm(x, size, *block.ln1)
            y, x_prev, kv, v_first = time_mixing(x_att, att_x, att_kv.float(), v_first, block.att)
            att_x.copy_(x_prev)
            state.keep("att_kv", i, kv)
            x = x + y
            y, x_prev = channel_mixing(F.layer_norm(x, size, *block.ln2), ffn_x, block.ffn)
            ffn_x.copy_(x_prev)
            x = x + y
        if not every:
            x = x[:, -1]
        return linear(F.layer_norm(x, size, *weights.ln_out), weights.head).float()

    def sizes(self, n_layer: int, n_embd: int, vocab_size: int, head_size: int = 64) -> ModelConfig:
        return usual_sizes(n_layer, n_embd, vocab_size, head_size)

    def random(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return rwkv7_reference.random_checkpoint(expected_shapes(config), seed, dtype)

    def reference(self, tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
        config = self.config({name: tuple(t.shape) for name, t in tensors.items()})
        return rwkv7_reference.logits(tensors, config, tokens)


def _time_mixing_weights(tensors: Mapping[str, Tensor], prefix: str, config: ModelConfig, place: Place) -> TimeMixing:
    fp32 = torch.float32

    def take(name: str, dtype: torch.dtype | None = None) -> Tensor:
        return place(prefix + name, tensors[prefix + name], dtype)

    def turned(name: str) -> Tensor:
        return take(name).t().contiguous()

    def adapter(letter: str) -> Adapter:
        return Adapter(take(f"{letter}0", fp32), turned(f"{letter}1"), turned(f"{letter}2"))

    return TimeMixing(
        shift=torch.stack([take(f"x_{part}") for part in "rwkvag"]).view(6, 1, 1, -1),
        decay=adapter("w"),
        rate=adapter("a"),
        value_mix=adapter("v") if f"{prefix}v0" in tensors else None,
        gate_down=turned("g1"),
        gate_up=turned("g2"),
        removal=take("k_k", fp32).view(config.n_head, config.head_size),
        replacement=take("k_a", fp32).view(config.n_head, config.head_size),
        bonus=take("r_k", fp32),
        rkv=stacked([matrix(place, tensors, f"{prefix}{part}.weight") for part in ("receptance", "key", "value")]),
        output=matrix(place, tensors, prefix + "output.weight"),
        ln_x_weight=take("ln_x.weight", fp32),
        ln_x_bias=take("ln_x.bias", fp32),
    )


@hookimpl
def rwkv_architectures() -> list[Architecture]:
    return [RWKV7()]

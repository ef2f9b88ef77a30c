"""RWKV-6 (x060): checkpoint names, sizes and forward pass.

Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv:2404.05892.
Annotations here are real types, not strings: torch.jit.script reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_layers import parts, rwkv6_reference
from rwkv_layers.linear import Matrix, dense, linear, linears, times
from rwkv_layers.matrices import QUANTIZATIONS, matrix, stacked
from rwkv_layers.parts import Norm, shift
from rwkv_layers.rwkv6_shapes import expected_shapes
from rwkv_layers.shapes import Shapes, count_layers, expected_state, why_not
from rwkv_layers.wkv6 import wkv_chunked, wkv_step
from rwkv_runtime import Architecture, CheckpointError, ModelConfig, Place, State, TensorSpec, hookimpl

RESCALE_EVERY = 6
"""In float16 the residual stream is halved every so many layers, so that it stays in range."""


class TimeMixing(NamedTuple):
    """R and D are the ranks of the shift's and the decay's adapters."""

    maa_x: Tensor  # [C]
    maa_w1: Tensor  # [5R, C]: w, k, v, r, g
    maa_w2: Tensor  # [5, R + 1, C]: the last row is what is added to the product (twice as fast as baddbmm)
    decay: Tensor  # [C] float32
    decay_w1: Tensor  # [D, C]
    decay_w2: Tensor  # [C, D]
    bonus: Tensor  # [H, N] float32
    kvrg: Matrix  # [4, C, C]: key, value, receptance, gate
    output: Matrix  # [C, C]
    ln_x_weight: Tensor  # [H, N] float32
    ln_x_bias: Tensor  # [H, N] float32


class ChannelMixing(NamedTuple):
    maa_k: Tensor  # [C]
    maa_r: Tensor  # [C]
    key: Matrix  # [F, C]
    value: Matrix  # [C, F]
    receptance: Matrix  # [C, C]


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
    rescaled: bool


def time_mixing(x: Tensor, x_prev: Tensor, kv: Tensor, w: TimeMixing) -> Tensor:
    """x [B, T, C] -> [B, T, C]. Updates x_prev [B, C] and kv float32 [B, H, N, N] in place."""
    kvrg, raw = projected(x, x_prev, w)
    return linear(attended(kvrg, raw, kv, w, x.dtype), w.output)


def projected(x: Tensor, x_prev: Tensor, w: TimeMixing) -> tuple[Tensor, Tensor]:
    """x [B, T, C] -> keys, values, receptances and gates [4, B, T, H, N], and decays float32 [B, T, H, N], whose
    logarithms are -e^them. Updates x_prev [B, C] in place."""
    B, T, C = x.shape
    H, N = w.bonus.shape
    # The adapters are small: for few rows, float32 costs less than oneDNN's start at a product of bfloat16 (17 us).
    dtype = w.maa_w1.dtype if B * T <= 16 else x.dtype
    wide = x.to(dtype)
    dx = shift(wide, x_prev).view(B * T, C)
    x_prev.copy_(x[:, -1])
    wide = wide.view(B * T, C)
    lora = torch.tanh(dense(torch.addcmul(wide, dx, w.maa_x.to(dtype)), w.maa_w1.to(dtype)))  # [B*T, 5R]
    lora = F.pad(lora.view(B * T, 5, -1).transpose(0, 1), [0, 1], value=1.0)  # [5, B*T, R + 1]
    mix = torch.bmm(lora, w.maa_w2.to(dtype))
    mixed = torch.addcmul(wide, dx, mix)  # [5, B*T, C]
    raw = dense(torch.tanh(dense(mixed[0], w.decay_w1.to(dtype))), w.decay_w2.to(dtype)) + w.decay
    kvrg = linears(mixed[1:].to(x.dtype), w.kvrg).to(dtype)
    return kvrg.view(4, B, T, H, N), raw.view(B, T, H, N)


def attended(kvrg: Tensor, raw: Tensor, kv: Tensor, w: TimeMixing, dtype: torch.dtype) -> Tensor:
    """The recurrence, its norm and the gate, of what `projected` gives -> [B, T, C] of a dtype. Updates kv in place;
    raw may change."""
    B, T, H, N = raw.shape
    log_w = raw.exp_().neg_()
    k, v, r, g = kvrg.unbind(0)
    out = wkv_step(r, k, v, log_w, w.bonus, kv) if T == 1 else wkv_chunked(r, k, v, log_w, w.bonus, kv)
    # group_norm, as a layer_norm of each head: 1.9 times as fast for many tokens
    out = torch.layer_norm(out, [N], eps=64e-5)
    out = torch.addcmul(w.ln_x_bias, out, w.ln_x_weight).to(kvrg.dtype).mul_(F.silu(g)).to(dtype)
    return out.view(B, T, H * N)


def channel_mixing(x: Tensor, x_prev: Tensor, w: ChannelMixing) -> Tensor:
    """x [B, T, C] -> [B, T, C]. Updates x_prev [B, C] in place. Inside, rows are columns: see `times`."""
    B, T, C = x.shape
    dx = shift(x, x_prev)
    x_prev.copy_(x[:, -1])
    k = times(w.key, torch.addcmul(x, dx, w.maa_k).view(B * T, C).t()).relu_().square_()  # [F, B*T]
    r = times(w.receptance, torch.addcmul(x, dx, w.maa_r).view(B * T, C).t()).sigmoid_()  # [C, B*T]
    out = r.mul_(times(w.value, k)).t()  # [B*T, C]
    # On a CPU it is turned round by a copy, which takes a third of what adding columns to rows does.
    return (out.contiguous() if x.is_cpu else out).view(B, T, C)


class RWKV6(Architecture):
    name = "rwkv6"
    summary = "RWKV-6 (x060, Finch)"
    ops = {"time_mixing": time_mixing, "channel_mixing": channel_mixing}
    quantizations = QUANTIZATIONS
    rounded = ("att_kv",)

    def why_not(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        return why_not(shapes, "RWKV-6", ".att.time_maa_*")

    def config(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        shape = Shapes(shapes)
        V, C = shape.get("emb.weight", 2)
        H, N = shape.get("blocks.0.att.time_faaaa", 2)
        ranks = {
            "maa": shape.get("blocks.0.att.time_maa_w2", 3)[1],
            "decay": shape.get("blocks.0.att.time_decay_w1", 2)[1],
        }
        width = shape.get("blocks.0.ffn.key.weight", 2)[0]
        config = ModelConfig(count_layers(shapes), C, H, N, width, V, ranks)
        if H * N != C:
            raise CheckpointError(f"tensor blocks.0.att.time_faaaa is {[H, N]}, which is not {C} in all")
        for name, expected in (expected_shapes(config) | expected_state(config, shapes)).items():
            shape.expect(name, expected)
        return config

    def weights(self, tensors: Mapping[str, Tensor], config: ModelConfig, place: Place, dtype: torch.dtype) -> Weights:
        def norm(name: str) -> Norm:
            return Norm(*(place(f"{name}.{part}", tensors[f"{name}.{part}"]) for part in ("weight", "bias")))

        tensors = {name: tensors[name].reshape(shape) for name, shape in expected_shapes(config).items()}
        rescaled = dtype == torch.float16
        emb = place("emb.weight", tensors["emb.weight"])
        blocks = []
        for i in range(config.n_layer):
            scale = 2.0 ** -(i // RESCALE_EVERY) if rescaled else 1.0
            att = _time_mixing_weights(tensors, f"blocks.{i}.att.", place, scale)
            ffn = _channel_mixing_weights(tensors, f"blocks.{i}.ffn.", place, scale)
            blocks.append(Block(norm(f"blocks.{i}.ln1"), att, norm(f"blocks.{i}.ln2"), ffn))
        head = matrix(place, tensors, "head.weight")
        return Weights(emb, norm("blocks.0.ln0"), tuple(blocks), norm("ln_out"), head, rescaled)

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
        names = ("att_x_prev", "att_kv", "ffn_x_prev")
        layers = zip(weights.blocks, *(state[name].unbind(0) for name in names), strict=True)
        for i, (block, att_x, att_kv, ffn_x) in enumerate(layers):
            kv = att_kv.float()  # itself, unless it is kept in 16 bits
            x = x + time_mixing(torch.layer_norm(x, size, *block.ln1), att_x, kv, block.att)
            if kv.dtype != att_kv.dtype:
                state.keep("att_kv", i, kv)
            x = x + channel_mixing(torch.layer_norm(x, size, *block.ln2), ffn_x, block.ffn)
            if weights.rescaled and (i + 1) % RESCALE_EVERY == 0:
                x = x / 2
        if not every:
            x = x[:, -1]
        return linear(torch.layer_norm(x, size, *weights.ln_out), weights.head).float()

    def sizes(self, n_layer: int, n_embd: int, vocab_size: int, head_size: int = 64) -> ModelConfig:
        ranks = {"maa": 32, "decay": 64} if n_embd < 4096 else {"maa": 64, "decay": 128}
        width = int(n_embd * 3.5) // 32 * 32
        return ModelConfig(n_layer, n_embd, n_embd // head_size, head_size, width, vocab_size, ranks)

    def random(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return rwkv6_reference.random_checkpoint(expected_shapes(config), seed, dtype)

    def reference(self, tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
        config = self.config({name: tuple(t.shape) for name, t in tensors.items()})
        return rwkv6_reference.logits(tensors, config, tokens)


def _time_mixing_weights(tensors: Mapping[str, Tensor], prefix: str, place: Place, scale: float) -> TimeMixing:
    def take(name: str, dtype: torch.dtype | None = None) -> Tensor:
        return place(prefix + name, tensors[prefix + name], dtype)

    fp32 = torch.float32
    bonus = take("time_faaaa", fp32)
    adapter = fp32 if take("time_maa_x").is_cpu else None
    maa = torch.stack([take(f"time_maa_{part}", adapter) for part in "wkvrg"])  # [5, C]
    return TimeMixing(
        maa_x=take("time_maa_x", adapter),
        maa_w1=take("time_maa_w1", adapter).t().contiguous(),
        maa_w2=torch.cat([take("time_maa_w2", adapter), maa.unsqueeze(1)], dim=1),
        decay=take("time_decay", fp32),
        decay_w1=take("time_decay_w1", adapter).t().contiguous(),
        decay_w2=take("time_decay_w2", adapter).t().contiguous(),
        bonus=bonus,
        kvrg=stacked(
            [matrix(place, tensors, f"{prefix}{part}.weight") for part in ("key", "value", "receptance", "gate")]
        ),
        output=matrix(place, tensors, prefix + "output.weight", scale),
        ln_x_weight=take("ln_x.weight", fp32).view(bonus.shape),
        ln_x_bias=take("ln_x.bias", fp32).view(bonus.shape),
    )


def _channel_mixing_weights(tensors: Mapping[str, Tensor], prefix: str, place: Place, scale: float) -> ChannelMixing:
    def take(name: str) -> Tensor:
        return place(prefix + name, tensors[prefix + name])

    return ChannelMixing(
        maa_k=take("time_maa_k"),
        maa_r=take("time_maa_r"),
        key=matrix(place, tensors, prefix + "key.weight"),
        value=matrix(place, tensors, prefix + "value.weight", scale),
        receptance=matrix(place, tensors, prefix + "receptance.weight"),
    )


@hookimpl
def rwkv_architectures() -> list[Architecture]:
    return [RWKV6()]

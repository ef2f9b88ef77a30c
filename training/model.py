"""Differentiable RWKV-6 (x060) with BlinkDL's tensor names, so that its state dict is a normal checkpoint.

Arithmetic: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence".
Parameters are fp32; matrix products run in a compute type (bf16 on CUDA), the residual stream, norms, decays and
the WKV in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.wkv import source, wkv

MIX_RANK = 32
DECAY_RANK = 64
# log w = -e^raw: above this w < e^-40, nothing in fp32, and sums over a chunk stay exact.
LARGEST_RAW_DECAY = 3.7


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model and how it is run.

    ``dropout`` acts on the embedding and on both branches of each layer, ``kernels`` asks for those of
    :mod:`training.wkv_kernels`: on CUDA only.
    """

    vocab_size: int = 4096
    width: int = 256
    layers: int = 10
    head_size: int = 64
    dropout: float = 0.1
    chunk: int = 32
    kernels: bool = False

    @property
    def ffn_width(self) -> int:
        return int(self.width * 3.5) // 32 * 32


def shifted(x: Tensor) -> Tensor:
    """Each position's predecessor, zero before the first: [B, T, C]."""
    return F.pad(x, (0, 0, 1, -1))


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """A bias-free layer in the type of its input."""
    return F.linear(x, module.weight.to(x.dtype))


class TimeMix(nn.Module):
    """Time mixing with data-dependent token shift and decay."""

    time_maa_x: nn.Parameter  # [1, 1, C], as the five below
    time_maa_w: nn.Parameter
    time_maa_k: nn.Parameter
    time_maa_v: nn.Parameter
    time_maa_r: nn.Parameter
    time_maa_g: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, heads = config.width, config.width // config.head_size
        self.heads, self.chunk, self.kernels = heads, config.chunk, config.kernels
        source(config.kernels)  # a kernel's operator is known before anything is compiled
        ratio = layer / max(config.layers - 1, 1)  # 0 at the first layer, 1 at the last
        falling = 1.0 - layer / config.layers
        position = torch.arange(width) / width
        for name, exponent, offset in (
            ("x", 1.0, 0.0),
            ("w", 1.0, 0.0),
            ("k", 1.0, 0.0),
            ("v", 1.0, 0.3 * ratio),
            ("r", 0.5, 0.0),
            ("g", 0.5, 0.0),
        ):
            value = 1.0 - (position ** (exponent * falling) + offset)
            self.register_parameter(f"time_maa_{name}", nn.Parameter(value.view(1, 1, width)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, 5 * MIX_RANK))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, MIX_RANK, width).uniform_(-0.01, 0.01))
        channel = torch.arange(width) / (width - 1)
        self.time_decay = nn.Parameter((-6 + 5 * channel ** (0.7 + 1.3 * ratio)).view(1, 1, width))
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, DECAY_RANK))
        self.time_decay_w2 = nn.Parameter(torch.empty(DECAY_RANK, width).uniform_(-0.01, 0.01))
        zigzag = ((torch.arange(width) + 1) % 3 - 1) * 0.1
        self.time_faaaa = nn.Parameter((ratio * (1 - channel) + zigzag).view(heads, config.head_size))
        self.receptance, self.key, self.value, self.gate, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.ln_x = nn.GroupNorm(heads, width, eps=64e-5)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / config.layers) ** 0.7)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape  # [B, T, C]
        dtype = x.dtype
        delta = shifted(x) - x
        base = x + delta * self.time_maa_x.to(dtype)
        low = torch.tanh(base @ self.time_maa_w1.to(dtype))  # [B, T, 5 * 32]
        low = low.view(batch * length, 5, MIX_RANK).transpose(0, 1)
        mixes = torch.bmm(low, self.time_maa_w2.to(dtype)).view(5, batch, length, width)
        xw = x + delta * (self.time_maa_w.to(dtype) + mixes[0])
        xk = x + delta * (self.time_maa_k.to(dtype) + mixes[1])
        xv = x + delta * (self.time_maa_v.to(dtype) + mixes[2])
        xr = x + delta * (self.time_maa_r.to(dtype) + mixes[3])
        xg = x + delta * (self.time_maa_g.to(dtype) + mixes[4])
        heads = (batch, length, self.heads, width // self.heads)
        r = linear(xr, self.receptance).view(heads)
        k = linear(xk, self.key).view(heads)
        v = linear(xv, self.value).view(heads)
        gate = F.silu(linear(xg, self.gate))
        raw = self.time_decay + torch.tanh(xw @ self.time_decay_w1.to(dtype)) @ self.time_decay_w2.to(dtype)
        lw = -raw.clamp(max=LARGEST_RAW_DECAY).exp().view(heads)  # at least fp32, as time_decay is
        out = wkv(r, k, v, lw, self.time_faaaa, self.chunk, self.kernels)
        # ln_x is a group norm over the channels of each head, here on [B, T, H, N].
        normed = F.layer_norm(out, heads[-1:], eps=self.ln_x.eps).reshape(x.shape)
        normed = normed * self.ln_x.weight + self.ln_x.bias
        return linear(normed.to(dtype) * gate, self.output)


class ChannelMix(nn.Module):
    """Channel mixing: a squared-ReLU layer behind a sigmoid receptance."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        value = 1.0 - (torch.arange(width) / width) ** (1.0 - layer / config.layers)
        self.time_maa_k = nn.Parameter(value.view(1, 1, width))
        self.time_maa_r = nn.Parameter(value.view(1, 1, width).clone())
        self.key = nn.Linear(width, config.ffn_width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(config.ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        delta = shifted(x) - x  # [B, T, C]
        key = linear(x + delta * self.time_maa_k.to(x.dtype), self.key)
        receptance = linear(x + delta * self.time_maa_r.to(x.dtype), self.receptance)
        return torch.sigmoid(receptance) * linear(F.relu(key).square(), self.value)


class Block(nn.Module):
    """One layer: time mixing, then channel mixing, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        mixed = self.att(self.ln1(x).to(dtype))
        x = x + F.dropout(mixed, self.dropout, self.training)
        mixed = self.ffn(self.ln2(x).to(dtype))
        return x + F.dropout(mixed, self.dropout, self.training)


class Head(nn.Linear):
    """Output layer with the loss beside it, so that both compile as one."""

    def loss(self, x: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Cross entropy of each token in nats, [B * T] fp32; 0 where the target is -100."""
        logits = linear(x.to(dtype), self).flatten(0, 1).float()  # [B * T, V]
        return F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=-100)


class StoryModel(nn.Module):
    """RWKV-6 language model over whole sequences from a zero state."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = Head(config.width, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """BlinkDL's start: orthogonal matrices, but zero where a branch ends: a layer begins as identity."""
        gains = {"att.key": 0.1, "att.gate": 0.1, "att.output": 0.0, "ffn.value": 0.0, "ffn.receptance": 0.0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                gain = 0.5 if name == "head" else gains.get(name.split(".", 2)[-1], 1.0)
                nn.init.orthogonal_(module.weight, gain=gain * max(1.0, rows / columns) ** 0.5)
        nn.init.normal_(self.emb.weight, std=0.02)

    def layer(self, index: int) -> Block:
        """A block, typed."""
        return cast(Block, self.blocks[index])

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, T] token ids -> [B, T, C], normed and ready for the head."""
        x: Tensor = self.layer(0).ln0(self.emb(tokens))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.dtype)
        hidden: Tensor = self.ln_out(x)
        return hidden

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] token ids -> logits [B, T, V]."""
        return linear(self.hidden(tokens).to(self.dtype), self.head)

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each target in nats, [B * T]; 0 where the target is -100."""
        return self.head.loss(self.hidden(tokens), targets, self.dtype)

    def compile_parts(self) -> None:
        """Compile a block, once for all layers, and the head with its loss."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.head.loss = torch.compile(self.head.loss, dynamic=False)  # type: ignore[method-assign]

"""RWKV-6 the slow way: the oracle every backend is tested against, and random checkpoints to test with.

`logits` reads a checkpoint's own tensors, unfolded, in float64, one token and one layer at a time.
It shares nothing with the fast path but the names of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_runtime import ModelConfig


def logits(tensors: Mapping[str, Tensor], config: ModelConfig, tokens: Sequence[int]) -> Tensor:
    """float64 logits after every token, [T, V], from a fresh state."""
    w = {name: t.detach().double().squeeze() for name, t in tensors.items()}
    C, H, N = config.n_embd, config.n_head, config.head_size
    zeros = torch.zeros(C, dtype=torch.float64)
    att_x, ffn_x = [zeros] * config.n_layer, [zeros] * config.n_layer
    kv = [_initial(w, i, H, N) for i in range(config.n_layer)]
    rows = []
    for token in tokens:
        x = _norm(w["emb.weight"].view(-1, C)[token], w, "blocks.0.ln0")
        for i in range(config.n_layer):
            y = _norm(x, w, f"blocks.{i}.ln1")
            out, kv[i] = _time_mixing(y, att_x[i], kv[i], w, f"blocks.{i}.att.", config)
            att_x[i], x = y, x + out
            y = _norm(x, w, f"blocks.{i}.ln2")
            x = x + _channel_mixing(y, ffn_x[i], w, f"blocks.{i}.ffn.")
            ffn_x[i] = y
        rows.append(w["head.weight"].view(-1, C) @ _norm(x, w, "ln_out"))
    return torch.stack(rows)


def _initial(w: Mapping[str, Tensor], i: int, H: int, N: int) -> Tensor:
    tuned = w.get(f"blocks.{i}.att.time_state")
    return torch.zeros(H, N, N, dtype=torch.float64) if tuned is None else tuned.view(H, N, N).transpose(1, 2)


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _time_mixing(
    x: Tensor, last: Tensor, s: Tensor, w: Mapping[str, Tensor], att: str, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    C, H, N = config.n_embd, config.n_head, config.head_size
    R, D = config.ranks["maa"], config.ranks["decay"]
    dx = last - x
    lora = torch.tanh((x + dx * w[f"{att}time_maa_x"]) @ w[f"{att}time_maa_w1"].view(C, 5 * R)).view(5, R)
    mixed = {}
    for row, part in enumerate("wkvrg"):
        shift = lora[row] @ w[f"{att}time_maa_w2"].view(5, R, C)[row] + w[f"{att}time_maa_{part}"]
        mixed[part] = x + dx * shift
    decay = torch.tanh(mixed["w"] @ w[f"{att}time_decay_w1"].view(C, D)) @ w[f"{att}time_decay_w2"].view(D, C)
    decay = torch.exp(-torch.exp(decay + w[f"{att}time_decay"])).view(H, N)
    r, k, v = ((w[f"{att}{name}.weight"] @ mixed[name[0]]).view(H, N) for name in ("receptance", "key", "value"))
    out = torch.zeros(H, N, dtype=torch.float64)
    new = torch.zeros_like(s)
    u = w[f"{att}time_faaaa"].view(H, N)
    for h in range(H):
        kv = torch.outer(k[h], v[h])
        out[h] = r[h] @ (u[h][:, None] * kv + s[h])
        new[h] = kv + decay[h][:, None] * s[h]
    centred = (out - out.mean(1, keepdim=True)) / torch.sqrt(out.var(1, unbiased=False, keepdim=True) + 64e-5)
    out = centred.view(C) * w[f"{att}ln_x.weight"] + w[f"{att}ln_x.bias"]
    return w[f"{att}output.weight"] @ (out * F.silu(w[f"{att}gate.weight"] @ mixed["g"])), new


def _channel_mixing(x: Tensor, last: Tensor, w: Mapping[str, Tensor], ffn: str) -> Tensor:
    dx = last - x
    k = torch.relu(w[f"{ffn}key.weight"] @ (x + dx * w[f"{ffn}time_maa_k"])) ** 2
    r = torch.sigmoid(w[f"{ffn}receptance.weight"] @ (x + dx * w[f"{ffn}time_maa_r"]))
    return r * (w[f"{ffn}value.weight"] @ k)


def random_checkpoint(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of these shapes that behave like trained ones: decays from weak to very strong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)

    tensors = {}
    for name, shape in shapes.items():
        part = name.split(".", 2)[-1]
        if name.endswith((".weight", "_w1", "_w2")) and len(shape) > 1:
            fan_in = shape[0] if name.endswith("_w1") else shape[-2] if name.endswith("_w2") else shape[-1]
            tensors[name] = normal(shape, 1.0 / math.sqrt(fan_in))
        elif "time_maa" in part:
            tensors[name] = torch.empty(shape, dtype=dtype).uniform_(0.0, 1.0, generator=generator)
        elif part == "att.time_decay":
            tensors[name] = torch.linspace(-7.0, 2.5, shape[-1]).to(dtype).view(shape)
        elif part == "att.time_faaaa":
            tensors[name] = normal(shape, 0.5)
        else:
            tensors[name] = normal(shape, 0.1) + (1.0 if name.endswith("weight") else 0.0)
    return tensors

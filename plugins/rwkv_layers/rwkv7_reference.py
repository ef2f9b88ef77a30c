"""RWKV-7 the slow way: the oracle every backend is tested against, and random checkpoints to test with.

`logits` reads a checkpoint's own tensors, unfolded, in float64, one token and one layer at a time, as Peng et al.,
"RWKV-7 Goose", arXiv:2503.14456, define it. It shares nothing with the fast path but the names of the tensors.
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
    empty = torch.zeros(H, N, N, dtype=torch.float64)
    states = [w.get(f"blocks.{i}.att.time_state", empty).view(H, N, N) for i in range(config.n_layer)]  # [H, V, K]
    rows = []
    for token in tokens:
        x = _norm(w["emb.weight"].view(-1, C)[token], w, "blocks.0.ln0")
        v_first = None
        for i in range(config.n_layer):
            y = _norm(x, w, f"blocks.{i}.ln1")
            part = {name.removeprefix(f"blocks.{i}.att."): t for name, t in w.items() if f"blocks.{i}.att." in name}
            out, states[i], v_first = _time_mixing(y, att_x[i], states[i], v_first, part, config)
            att_x[i], x = y, x + out
            y = _norm(x, w, f"blocks.{i}.ln2")
            k = torch.relu(w[f"blocks.{i}.ffn.key.weight"] @ _shifted(y, ffn_x[i], w[f"blocks.{i}.ffn.x_k"])) ** 2
            x = x + w[f"blocks.{i}.ffn.value.weight"] @ k
            ffn_x[i] = y
        rows.append(w["head.weight"].view(-1, C) @ _norm(x, w, "ln_out"))
    return torch.stack(rows)


def _norm(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _shifted(x: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """Token shift: a share of each channel comes from the token before."""
    return (1 - share) * x + share * last


def _adapter(x: Tensor, w: Mapping[str, Tensor], letter: str) -> tuple[Tensor, Tensor]:
    """The two matrices of a low-rank adapter [C, rank], [rank, C], which files of rank 1 keep as vectors."""
    return w[f"{letter}1"].view(len(x), -1), w[f"{letter}2"].view(-1, len(x))


def _time_mixing(
    x: Tensor, last: Tensor, s: Tensor, v_first: Tensor | None, w: Mapping[str, Tensor], config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """x, last [C]; s [H, V, K] -> output [C], next s, the values of the first layer [C]."""
    C, H, N = config.n_embd, config.n_head, config.head_size
    mixed = {part: _shifted(x, last, w[f"x_{part}"]) for part in "rwkvag"}
    down, up = _adapter(x, w, "w")
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w["w0"] + torch.tanh(mixed["w"] @ down) @ up)).view(H, N)
    down, up = _adapter(x, w, "a")
    rate = torch.sigmoid(w["a0"] + mixed["a"] @ down @ up)
    down, up = _adapter(x, w, "g")
    gate = torch.sigmoid(mixed["g"] @ down) @ up
    r, k, v = (w[f"{name}.weight"] @ mixed[name[0]] for name in ("receptance", "key", "value"))
    if v_first is None:
        v_first = v
    else:
        down, up = _adapter(x, w, "v")
        v = v + (v_first - v) * torch.sigmoid(w["v0"] + mixed["v"] @ down @ up)
    removal = (k * w["k_k"]).view(H, N)
    k = (k * (1 + (rate - 1) * w["k_a"])).view(H, N)
    r, v_heads, rate = r.view(H, N), v.view(H, N), rate.view(H, N)
    out, new = torch.zeros(H, N, dtype=torch.float64), torch.zeros_like(s)
    for h in range(H):
        kappa = removal[h] / removal[h].norm().clamp(min=1e-12)
        change = torch.diag(decay[h]) - torch.outer(kappa, kappa * rate[h])
        new[h] = s[h] @ change + torch.outer(v_heads[h], k[h])
        out[h] = new[h] @ r[h]
    centred = (out - out.mean(1, keepdim=True)) / torch.sqrt(out.var(1, unbiased=False, keepdim=True) + 64e-5)
    bonus = (r * k * w["r_k"].view(H, N)).sum(1, keepdim=True) * v_heads
    out = centred.view(C) * w["ln_x.weight"] + w["ln_x.bias"] + bonus.view(C)
    return w["output.weight"] @ (out * gate), new, v_first


def random_checkpoint(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights of these shapes that behave like trained ones: decays from weak to the strongest there is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], mean: float, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(mean, std, generator=generator)

    around = {"w0": (-2.0, 3.0), "a0": (0.0, 1.5), "v0": (0.5, 1.0), "k_k": (0.8, 0.2), "k_a": (1.0, 0.2)}
    tensors = {}
    for name, shape in shapes.items():
        part = name.split(".", 2)[-1].removeprefix("att.")
        if part.startswith(("x_", "ffn.x_")):
            tensors[name] = torch.empty(shape, dtype=dtype).uniform_(0.0, 1.0, generator=generator)
        elif part in around:
            tensors[name] = normal(shape, *around[part])
        elif part == "r_k":
            tensors[name] = normal(shape, 0.0, 0.3)
        elif len(shape) > 1:
            fan_in = shape[-1] if name.endswith("weight") else shape[0]  # adapters are kept transposed
            tensors[name] = normal(shape, 0.0, 1.0 / math.sqrt(fan_in))
        else:
            tensors[name] = normal(shape, 1.0 if name.endswith("weight") else 0.0, 0.1)
    return tensors

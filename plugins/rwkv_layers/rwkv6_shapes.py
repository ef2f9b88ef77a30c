"""The tensors of an RWKV-6 checkpoint: their names and shapes, and what to say where they differ."""

from __future__ import annotations

from rwkv_runtime import ModelConfig


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of these sizes, with its shape."""
    C, F_, V = config.n_embd, config.n_ffn, config.vocab_size
    R, D = config.ranks["maa"], config.ranks["decay"]
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(config.n_layer):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}ln_x"]
        shapes |= {f"{att}time_maa_{part}": (C,) for part in "xwkvrg"}
        shapes |= {f"{att}{part}.weight": (C, C) for part in ("receptance", "key", "value", "gate", "output")}
        shapes |= {f"{att}time_maa_w1": (C, 5 * R), f"{att}time_maa_w2": (5, R, C)}
        shapes |= {f"{att}time_decay": (C,), f"{att}time_decay_w1": (C, D), f"{att}time_decay_w2": (D, C)}
        shapes[f"{att}time_faaaa"] = (config.n_head, config.head_size)
        shapes |= {f"{ffn}time_maa_{part}": (C,) for part in "kr"}
        shapes |= {f"{ffn}key.weight": (F_, C), f"{ffn}value.weight": (C, F_), f"{ffn}receptance.weight": (C, C)}
    return shapes | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}

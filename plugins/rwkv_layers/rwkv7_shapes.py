"""The tensors of an RWKV-7 checkpoint: their names and shapes, and the sizes read from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rwkv_layers.shapes import Shapes, count_layers, expected_state
from rwkv_runtime import CheckpointError, ModelConfig

ADAPTERS = {"w": "decay", "a": "rate", "v": "value", "g": "gate"}
"""Low-rank adapters by the letter their tensors begin with: w0 [C], w1 [C, rank], w2 [rank, C]; g has no g0."""


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Sizes from the shapes. Raises CheckpointError naming a tensor that is missing or of a wrong shape."""
    shape = Shapes(shapes)
    layers = count_layers(shapes)
    V, C = shape.get("emb.weight", 2)
    H, N = shape.get("blocks.0.att.r_k", 2)
    ranks = {}
    for letter, name in ADAPTERS.items():
        layer = 1 if letter == "v" else 0
        ranks[name] = shape.get(f"blocks.{layer}.att.{letter}1", 2)[1] if layer < layers else 0
    config = ModelConfig(layers, C, H, N, shape.get("blocks.0.ffn.key.weight", 2)[0], V, ranks)
    if H * N != C:
        raise CheckpointError(f"tensor blocks.0.att.r_k is {[H, N]}, which is not {C} in all")
    for name, expected in (expected_shapes(config) | expected_state(config, shapes)).items():
        shape.expect(name, expected)
    return config


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of these sizes, with its shape.

    The first layer has nothing to mix its values with; files that carry its v0, v1 and v2 do not use them.
    """
    C, F, V = config.n_embd, config.n_ffn, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(config.n_layer):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2", f"{att}ln_x"]
        shapes |= {f"{att}x_{part}": (C,) for part in "rwkvag"}
        for letter, name in ADAPTERS.items():
            if letter == "v" and i == 0:
                continue
            rank = config.ranks[name]
            shapes |= {f"{att}{letter}1": (C, rank), f"{att}{letter}2": (rank, C)}
            if letter != "g":
                shapes[f"{att}{letter}0"] = (C,)
        shapes |= {f"{att}k_k": (C,), f"{att}k_a": (C,), f"{att}r_k": (config.n_head, config.head_size)}
        shapes |= {f"{att}{part}.weight": (C, C) for part in ("receptance", "key", "value", "output")}
        shapes |= {f"{ffn}x_k": (C,), f"{ffn}key.weight": (F, C), f"{ffn}value.weight": (C, F)}
    return shapes | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def usual_sizes(n_layer: int, n_embd: int, vocab_size: int, head_size: int) -> ModelConfig:
    """The proportions of the released models; ranks grow with the width, in steps of 32."""

    def rank(factor: float, power: float) -> int:
        return max(32, round(factor * math.pow(n_embd, power) / 32) * 32)

    ranks = {"decay": rank(1.8, 0.5), "rate": rank(1.8, 0.5), "value": rank(1.3, 0.5), "gate": rank(0.6, 0.8)}
    return ModelConfig(n_layer, n_embd, n_embd // head_size, head_size, 4 * n_embd, vocab_size, ranks)

"""RWKV-7 beside the `rwkv` package, and what it alone has. What holds for every architecture is in test_layers.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Tensors, apart, built, logits_of, off, only, tiny_config, tokens_of
from rwkv_package import package_logits

from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins

pytestmark = only("rwkv7")
FLOAT32 = 1e-4
"""What is promised; 1e-6 is usual."""
HALF = {"bf16": (torch.bfloat16, 0.05), "fp16": (torch.float16, 0.01)}
"""Of two layers of random weights; each implementation rounds elsewhere."""
TOKENS = tokens_of(1000)


@pytest.fixture(scope="module")
def wide(architecture: Architecture) -> Tensors:
    """Two heads of 64 and released proportions; weights fit bfloat16."""
    return architecture.random(architecture.sizes(3, 128, 260), seed=1, dtype=torch.bfloat16)


@pytest.mark.parametrize(("strategy", "jit"), [("fp32", "0"), ("fp32", "1"), ("bf16", "1"), ("fp16", "1")])
def test_logits_are_those_of_the_rwkv_package(
    strategy: str, jit: str, wide: Tensors, plugins: Plugins, tmp_path: Path
) -> None:
    pytest.importorskip("rwkv")
    dtype, tolerance = HALF.get(strategy, (torch.float32, FLOAT32))
    tensors = {name: t.to(dtype) for name, t in wide.items()}
    at_once, singly = package_logits(tensors, TOKENS, f"cpu {strategy}", tmp_path, RWKV_JIT_ON=jit, RWKV_V7_ON="1")
    model = built(tensors, plugins)
    assert model.dtype == dtype
    assert off(logits_of(model, TOKENS), at_once) < tolerance
    assert off(logits_of(model, TOKENS[:40], [1] * 40)[:10], singly) < tolerance
    assert off(logits_of(model, TOKENS[:1]), singly[:1]) < tolerance


@pytest.mark.parametrize(
    ("low", "high"),
    [(-20.0, 20.0), (-7.0, 3.0), (20.0, 20.0), (88.0, 200.0), (-20.0, -20.0), (-200.0, -88.0)],
    ids=["all", "usual", "strongest", "sigmoid saturates", "w nearly 1", "w = 1"],
)
@pytest.mark.parametrize("rate", [None, 30.0, -30.0], ids=["rates", "all replaced", "nothing replaced"])
def test_strong_and_weak_decays_and_rates(
    low: float, high: float, rate: float | None, architecture: Architecture, checkpoint: Tensors, plugins: Plugins
) -> None:
    changed = {n: torch.linspace(low, high, t.numel()) for n, t in checkpoint.items() if n.endswith("att.w0")}
    if rate is not None:
        changed |= {n: torch.full_like(t, rate) for n, t in checkpoint.items() if n.endswith("att.a0")}
    tensors = checkpoint | changed
    tokens = TOKENS[:100] + [7] * 50  # a token again and again: the same key, replaced each time
    expected = architecture.reference(tensors, tokens)
    model = built(tensors, plugins)
    assert apart(logits_of(model, tokens), expected) < FLOAT32
    assert apart(logits_of(model, tokens, [1] * 40), expected) < FLOAT32


def test_keys_of_zero_remove_nothing(architecture: Architecture, checkpoint: Tensors, plugins: Plugins) -> None:
    zeros = {n: torch.zeros_like(t) for n, t in checkpoint.items() if n.endswith("att.key.weight")}
    for dtype, tolerance in ((torch.float32, 1e-5), HALF["fp16"]):
        tensors = {name: t.to(dtype) for name, t in (checkpoint | zeros).items()}
        expected = architecture.reference(tensors, TOKENS[:40])
        assert apart(logits_of(built(tensors, plugins), TOKENS[:40]), expected) < tolerance


def test_the_first_layer_may_carry_a_value_adapter_that_is_not_used(
    checkpoint: Tensors, model: Model, plugins: Plugins
) -> None:
    extra = {f"blocks.0.att.v{i}": checkpoint[f"blocks.1.att.v{i}"] for i in range(3)}
    assert torch.equal(logits_of(built(checkpoint | extra, plugins), TOKENS[:20]), logits_of(model, TOKENS[:20]))


def test_one_layer_needs_no_value_adapter(architecture: Architecture, plugins: Plugins) -> None:
    tensors = architecture.random(tiny_config(architecture, layers=1))
    assert not any(".att.v0" in name for name in tensors)
    model = built(tensors, plugins)
    assert model.config.ranks["value"] == 0
    assert apart(logits_of(model, TOKENS[:40]), architecture.reference(tensors, TOKENS[:40])) < FLOAT32


def test_every_rank_is_read_from_the_shapes(architecture: Architecture, plugins: Plugins) -> None:
    ranks = {"decay": 1, "rate": 3, "value": 5, "gate": 7}
    config = replace(tiny_config(architecture), ranks=ranks, n_ffn=40)
    tensors = architecture.random(config)
    model = built(tensors, plugins)
    assert model.config == config
    assert apart(logits_of(model, TOKENS[:20]), architecture.reference(tensors, TOKENS[:20])) < FLOAT32


@pytest.mark.parametrize(
    ("width", "ranks"),
    [(768, (64, 64, 32, 128)), (1024, (64, 64, 32, 160)), (2048, (96, 96, 64, 256)), (2560, (96, 96, 64, 320))],
)
def test_usual_sizes_are_those_of_released_models(
    width: int, ranks: tuple[int, ...], architecture: Architecture
) -> None:
    config = architecture.sizes(12, width, 65536)
    assert tuple(config.ranks[name] for name in ("decay", "rate", "value", "gate")) == ranks
    assert (config.n_head, config.n_ffn) == (width // 64, 4 * width)


@pytest.mark.parametrize(
    ("names", "version"),
    [
        (["blocks.0.att.time_mix_k", "blocks.0.att.time_first"], "RWKV-4: it has blocks.0.att.time_mix_k"),
        (["blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"], "RWKV-5: it has blocks.0.att.time_mix_k"),
        (["blocks.0.att.time_maa_x"], "RWKV-6: it has blocks.0.att.time_maa_x"),
        (["blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight"], "RWKV-7 with DeepEmbed: it has blocks.0.ffn.s_emb.weight"),
        (["model.layers.0.self_attn.q_proj.weight"], "no blocks"),
    ],
)
def test_other_versions_are_called_by_their_names(names: list[str], version: str, architecture: Architecture) -> None:
    assert version in (architecture.why_not(dict.fromkeys(names, (4,))) or "")

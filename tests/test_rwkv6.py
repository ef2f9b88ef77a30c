"""RWKV-6 beside the `rwkv` package, and with any decay. What holds for every architecture is in test_layers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Tensors, apart, built, logits_of, off, only, tokens_of
from rwkv_package import package_logits

from rwkv_runtime.model import Architecture
from rwkv_runtime.plugins import Plugins

pytestmark = only("rwkv6")
FLOAT32 = 1e-4
"""What is promised; 1e-6 is usual."""
BFLOAT16 = 0.05
"""Two layers of random weights; each implementation rounds elsewhere."""
TOKENS = tokens_of(1000)


@pytest.fixture(scope="module")
def wide(architecture: Architecture) -> Tensors:
    """Two heads of 64, as the `rwkv` package wants them, and a tuned state; weights fit bfloat16."""
    tensors = architecture.random(architecture.sizes(2, 128, 260), seed=1, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(2)
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=draw).bfloat16() for i in range(2)}
    return tensors | states


@pytest.mark.parametrize(
    ("strategy", "jit", "tolerance"),
    [("cpu fp32", "0", FLOAT32), ("cpu fp32", "1", FLOAT32), ("cpu bf16", "1", BFLOAT16)],
)
def test_logits_are_those_of_the_rwkv_package(
    strategy: str, jit: str, tolerance: float, wide: Tensors, plugins: Plugins, tmp_path: Path
) -> None:
    pytest.importorskip("rwkv")
    bfloat16 = strategy.endswith("bf16")
    # The package normalises the embedding in the file's own type, so the file must be of the type compared.
    tensors = wide if bfloat16 else {name: t.float() for name, t in wide.items()}
    at_once, singly = package_logits(tensors, TOKENS, strategy, tmp_path, RWKV_JIT_ON=jit)
    model = built(tensors, plugins)
    assert model.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert off(logits_of(model, TOKENS), at_once) < tolerance
    assert off(logits_of(model, TOKENS[:10], [1] * 9), singly) < tolerance
    assert off(logits_of(model, TOKENS[:1]), singly[:1]) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_half_types_take_other_ways_for_few_rows_to_the_same_end(
    rows: int, dtype: torch.dtype, architecture: Architecture, checkpoint: Tensors, plugins: Plugins
) -> None:
    """Products and adapters go by the number of rows times tokens; here are all of them, few and many."""
    tensors = {name: t.to(dtype) for name, t in checkpoint.items()}
    model, tokens = built(tensors, plugins), TOKENS[:60]
    expected = architecture.reference(tensors, tokens)
    state, batch = model.new_state(rows), torch.tensor([tokens] * rows)
    parts = batch.split([1, 1, 2, 5, 16, 35], dim=1)
    seen = [architecture.forward(architecture.ops, model.weights, part, state, every=True) for part in parts]
    for row in torch.cat(seen, dim=1):
        assert apart(row, expected) < BFLOAT16


@pytest.mark.parametrize(
    ("low", "high"),
    [(-20.0, 20.0), (-7.0, 3.0), (3.0, 3.0), (20.0, 20.0), (88.0, 200.0), (-20.0, -20.0), (-200.0, -88.0)],
    ids=["all", "usual", "log w = -20", "w = 0", "exp overflows", "w nearly 1", "w = 1"],
)
def test_strong_and_weak_decays(
    low: float, high: float, architecture: Architecture, checkpoint: Tensors, plugins: Plugins
) -> None:
    decays = {n: torch.linspace(low, high, t.numel()) for n, t in checkpoint.items() if n.endswith("time_decay")}
    tensors = checkpoint | decays
    expected = architecture.reference(tensors, TOKENS[:150])
    model = built(tensors, plugins)
    assert apart(logits_of(model, TOKENS[:150]), expected) < FLOAT32
    assert apart(logits_of(model, TOKENS[:150], [1] * 40), expected) < FLOAT32

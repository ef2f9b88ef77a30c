"""The kernels of a decode step of many rows do what their naive twins do."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from drawn import TUNING, C, Draw, R, assert_close, near_enough, normed, shifted, stepped
from helpers import CPU
from rwkv_backends.fused import FAMILIES
from rwkv_backends.kernels import batch
from rwkv_backends.kernels.tuning import Tuning

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.plugins import Plugins

B = 19  # more than a tile of rows


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_layer_begins(dtype: torch.dtype, parts: int) -> None:
    draw, first = Draw(dtype), parts == 0
    x, prev, norm, maa, r, v = draw(B, C), draw(B, C), draw.norm(), draw(C), draw(B, C), draw(parts, B, C)
    twin = x.double() if first else (x.double() + torch.sigmoid(r.double()) * v.double().sum(0)) * 0.5
    before = prev.clone()
    dx, out = batch.begin(x, None if first else (r, v), 1.0 if first else 0.5, prev, norm, maa, TUNING)
    e = normed(x, norm)
    far = shifted(e, before, 1)
    assert_close(dtype, (x, twin), (prev, e), (dx, far), (out, e + far * maa.double()))


def test_the_last_layer_ends(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    x, norm, r, v = draw(B, C), draw.norm(), draw(B, C), draw(2, B, C)
    twin = x.double() + torch.sigmoid(r.double()) * v.double().sum(0)
    out = batch.end(x, (r, v), 1.0, norm, TUNING)
    assert_close(dtype, (x, twin), (out, normed(x, norm)))


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_shift(dtype: torch.dtype, parts: int) -> None:
    draw = Draw(dtype)
    x, prev, norm, maa, gain = draw(B, C), draw(B, C), draw.norm(), draw.norm(), draw(parts, B, C, dtype=torch.float32)
    before, twin = prev.clone(), x.double() + gain.double().sum(0)
    k, r = batch.shift(x, gain if parts else None, prev, norm, maa, TUNING)
    e = normed(x, norm)
    dx = shifted(e, before, 1)
    assert_close(dtype, (x, twin), (k, e + dx * maa[0].double()), (r, e + dx * maa[1].double()), (prev, e))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [3, B, 70])
def test_mixtures(dtype: torch.dtype, rows: int, parts: int) -> None:
    draw = Draw(dtype)
    lora, e, dx, w = draw(parts, rows, 5 * R), draw(rows, C), draw(rows, C), draw(5, R + 1, C)
    low = torch.tanh(lora.double().sum(0)).view(rows, 5, R).transpose(0, 1)
    twin = e.double() + dx.double() * (torch.bmm(low, w.double()[:, :R]) + w.double()[:, R:])
    assert_close(dtype, (batch.mixtures(lora, e, dx, w, TUNING), twin))


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize(
    ("dtype", "state", "skinny"),
    [("float32", "float32", 0), ("float32", "float16", 0), ("float16", "float32", 0), ("float16", "float32", 64)],
    ids=str,
)
def test_a_step_is_what_plain_pytorch_makes_of_it(
    plugins: Plugins, dtype: str, state: str, skinny: int, quant: str | None
) -> None:
    """Seven layers, so that float16 halves the residual stream; products by torch, and our own."""
    architecture = plugins.architectures.get("rwkv6")
    config = replace(architecture.sizes(7, 48, 37, 16), ranks={"maa": 5, "decay": 9})
    both = stepped(architecture, config, dtype, state, quant, replace(TUNING, skinny_rows=skinny))
    assert near_enough(*both, 1e-5 if (dtype, state) == ("float32", "float32") else 5e-2)


def test_many_rows_take_this_way(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = plugins.architectures.get("rwkv6")
    model = build_model(architecture.random(architecture.sizes(1, 16, 37, 16)), [architecture], CPU)
    begun: list[int] = []
    begin = batch.begin
    monkeypatch.setattr(batch, "begin", lambda x, *args: begun.append(len(x)) or begin(x, *args))
    forward = import_module(FAMILIES["rwkv6"]).forward(model, Tuning(overlap=False))
    for rows, length in ((1, 1), (2, 1), (3, 1), (3, 2)):
        forward(torch.zeros(rows, length, dtype=torch.int64), model.new_state(rows))
    assert begun == [3]

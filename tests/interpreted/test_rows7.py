"""The kernels of RWKV-7's decode steps do what their naive twins do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from drawn import TUNING, Draw, assert_close, near_enough, stepped
from rwkv_backends.kernels import adapters7, wkv7
from rwkv_backends.kernels.adapters7 import Adapters
from rwkv_backends.kernels.wkv7 import Heads
from torch import Tensor

from rwkv_runtime.plugins import Plugins

B, H, R = 3, 2, (5, 7, 3, 9)
DECAYS = {"usual": (-2.0, 3.0), "strong": (30.0, 1.0), "weak": (-30.0, 1.0), "all": (0.0, 30.0)}
"""Mean and spread of what decays are the sigmoids of."""


class Case:
    """One token of B rows, the last of the state not among them, and what comes out by the definition in float64."""

    def __init__(self, N: int, decay: str, layer: int, dtype: torch.dtype) -> None:
        draw, full, C = Draw(dtype), torch.float32, H * N
        mean, spread = DECAYS[decay]
        self.n = 4 if layer else 3
        heads = [draw(H, N, dtype=full) for _ in range(5)]
        base = draw(C, dtype=full) if layer else None
        self.heads = Heads(draw(C, dtype=full) * spread + mean, draw(C, dtype=full), base, *heads)
        self.rkv, self.raw = draw(3, B, C), draw(self.n, B, C)
        self.first = draw(B, C) if layer else None
        self.kv = draw(B + 1, H, N, N, dtype=full)

    def expected(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        N = self.kv.shape[-1]
        w, heads = raw.double(), [None if t is None else t.double() for t in self.heads]
        r, k, v = (t.double().view(B, H, N) for t in self.rkv)
        decay = torch.exp(-(torch.e**-0.5) * torch.sigmoid(heads[0] + w[-2])).view(B, H, N)
        rate = torch.sigmoid(heads[1] + w[-3]).view(B, H, N)
        if self.first is not None:
            v = torch.lerp(v, self.first.double().view(B, H, N), torch.sigmoid(heads[2] + w[0]).view(B, H, N))
        _, _, _, removal, replacement, bonus, weight, bias = heads
        kappa = F.normalize(k * removal, dim=-1)
        k = k * (1 + (rate - 1) * replacement)
        s = self.kv[:B].double()
        seen = torch.einsum("bhk,bhkv->bhv", -kappa, s)
        s = s * decay[..., None] + (kappa * rate)[..., None] * seen[:, :, None] + k[..., None] * v[:, :, None]
        o = torch.einsum("bhk,bhkv->bhv", r, s).view(B, H * N)
        y = F.group_norm(o, H, weight.flatten(), bias.flatten(), 64e-5).view(B, H, N)
        y = y + (r * k * bonus).sum(-1, keepdim=True) * v
        return y.view(B, H * N) * w[-1], s


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_one_token_of_many_rows(dtype: torch.dtype, decay: str, N: int, layer: int) -> None:
    case = Case(N, decay, layer, dtype)
    kv = case.kv.clone()
    out = wkv7.rows(case.rkv, case.raw, case.heads, case.first, kv[:B], case.rkv, TUNING)
    assert out.dtype == dtype
    assert_close(dtype, *zip((out, kv[:B]), case.expected(case.raw), strict=True))
    assert torch.equal(kv[B], case.kv[B])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_one_token_of_few_rows(dtype: torch.dtype, decay: str, layer: int) -> None:
    """What the adapters' filling gives is never read, as it is never written."""
    case, draw, full = Case(16, decay, layer, dtype), Draw(dtype), torch.float32
    ranks, C = R if layer else (0, *R[1:]), H * 16
    low, up = torch.full((B, case.n, 12), torch.nan), torch.zeros(case.n, C, 12, dtype=dtype)
    raw = torch.zeros(case.n, B, C, dtype=torch.float64)
    for i, rank in enumerate(ranks[-case.n :]):
        low[:, i, :rank], up[i, :, :rank] = draw(B, rank, dtype=full), draw.matrix(C, rank)
        x = low[:, i, :rank].double()
        x = {1: torch.sigmoid, 2: torch.tanh}.get(case.n - i, lambda x: x)(x)
        raw[i] = x @ up[i, :, :rank].double().t()
    kv, normed, prev = case.kv.clone(), draw(B, C), draw(B, C)
    case.rkv = case.rkv.float()
    adapters = Adapters(up, up, ranks)
    low = low.view(B, -1)
    out = wkv7.few(case.rkv, low, adapters, case.heads, case.first, kv[:B], normed, prev, TUNING)
    assert out.dtype == dtype
    assert_close(dtype, *zip((out, kv[:B]), case.expected(raw), strict=True))
    assert torch.equal(prev, normed)
    assert torch.equal(kv[B], case.kv[B])


def test_keys_of_zero_change_nothing_but_by_decay() -> None:
    case = Case(16, "usual", 0, torch.float32)
    case.rkv[1] = 0
    kv = case.kv.clone()
    out = wkv7.rows(case.rkv, case.raw, case.heads, None, kv[:B], case.rkv, TUNING)
    assert_close(torch.float32, *zip((out, kv[:B]), case.expected(case.raw), strict=True))


@pytest.mark.parametrize("n", [3, 4])
def test_activate(dtype: torch.dtype, n: int) -> None:
    low = Draw(dtype)(n, 70, 80)  # more than a program's share, and no multiple of it
    twin = low.double()
    twin[-2], twin[-1] = torch.tanh(twin[-2]), torch.sigmoid(twin[-1])
    adapters7.activate(low, TUNING)
    assert_close(dtype, (low, twin))


@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize(
    ("dtype", "state"), [("float32", "float32"), ("float32", "float16"), ("float16", "float32")], ids=str
)
def test_a_step_is_what_plain_pytorch_makes_of_it(plugins: Plugins, dtype: str, state: str, quant: str | None) -> None:
    architecture = plugins.architectures.get("rwkv7")
    ranks = dict(zip(("decay", "rate", "value", "gate"), R, strict=True))
    config = replace(architecture.sizes(3, 48, 37, 16), ranks=ranks)
    both = stepped(architecture, config, dtype, state, quant, TUNING)
    assert near_enough(*both, 1e-5 if (dtype, state) == ("float32", "float32") else 5e-2)

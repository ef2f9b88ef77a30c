"""RWKV-7's WKV for many tokens at once does what the recurrence does, whatever the decays and the keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import apart, off
from rwkv_backends.kernels import spans7
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.wkv7 import Heads
from torch import Tensor

B, H = 2, 2
SHORT = Tuning(overlap=False, span=32)
DECAYS = {"usual": (-2.0, 3.0), "strong": (30.0, 1.0), "weak": (-30.0, 1.0), "all": (0.0, 30.0)}
"""Mean and spread of what decays are the sigmoids of: the strongest is 0.545."""
KEYS = {"usual": (1.0, 0.0), "alike": (0.05, 0.0), "alike and all replaced": (0.01, 30.0)}
"""Spread of the keys around one common key, and mean of what rates are the sigmoids of."""


class Case:
    """B * T tokens, and what comes out by the definition in float64."""

    def __init__(
        self, T: int, N: int, decay: str = "usual", keys: str = "usual", layer: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(T)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.T, self.N, C = T, N, H * N
        mean, spread = DECAYS[decay]
        apart, certainty = KEYS[keys]
        heads = [draw(H, N) for _ in range(5)]
        if keys != "usual":
            heads[0] = torch.ones(H, N)
        self.heads = Heads(draw(C) * spread + mean, draw(C) + certainty, draw(C) if layer else None, *heads)
        rkv = draw(3, B * T, C)
        rkv[1] = draw(1, C) + apart * rkv[1] if keys != "usual" else rkv[1]
        rkv[1] /= N**0.5
        self.rkv, self.raw = rkv.to(dtype), draw(3 + layer, B * T, C).to(dtype)
        self.first = draw(B * T, C).to(dtype) if layer else None
        self.kv = draw(B + 1, H, N, N)

    def expected(self) -> tuple[Tensor, Tensor]:
        by_token = B, self.T, H, self.N
        w, heads = self.raw.double(), [None if t is None else t.double() for t in self.heads]
        r, k, v = (t.double().view(by_token) for t in self.rkv)
        decay = torch.exp(-(torch.e**-0.5) * torch.sigmoid(heads[0] + w[-2])).view(by_token)
        rate = torch.sigmoid(heads[1] + w[-3]).view(by_token)
        if self.first is not None:
            v = torch.lerp(v, self.first.double().view(by_token), torch.sigmoid(heads[2] + w[0]).view(by_token))
        _, _, _, removal, replacement, bonus, weight, bias = heads
        kappa = F.normalize(k * removal, dim=-1)
        k = k * (1 + (rate - 1) * replacement)
        s, outs = self.kv[:B].double(), []
        for t in range(self.T):
            seen = torch.einsum("bhk,bhkv->bhv", -kappa[:, t], s)
            s = s * decay[:, t, ..., None] + (kappa * rate)[:, t, ..., None] * seen[:, :, None]
            s = s + k[:, t, ..., None] * v[:, t, :, None]
            outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s))
        o = torch.stack(outs, 1).view(-1, H * self.N)
        y = F.group_norm(o, H, weight.flatten(), bias.flatten(), 64e-5).view(by_token)
        y = y + (r * k * bonus).sum(-1, keepdim=True) * v
        return y.view(-1, H * self.N) * w[-1], s

    def ours(self, tuning: Tuning) -> tuple[Tensor, Tensor]:
        kv = self.kv.clone()
        out = spans7.wkv(self.rkv, self.raw, self.heads, self.first, kv[:B], self.rkv, tuning)
        assert out.dtype == self.rkv.dtype
        assert torch.equal(kv[B], self.kv[B])
        return out, kv[:B]


@pytest.mark.parametrize("T", [2, 16, 35])
@pytest.mark.parametrize("decay", sorted(DECAYS))
@pytest.mark.parametrize("keys", sorted(KEYS))
def test_it_is_the_recurrence(decay: str, keys: str, T: int) -> None:
    case = Case(T, 16, decay, keys)
    for ours, theirs in zip(case.ours(SHORT), case.expected(), strict=True):
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("span", [16, 64, 128])
@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 0.002), (torch.bfloat16, 0.02)], ids=str)
def test_spans_of_any_length_and_halves_give_the_same(dtype: torch.dtype, far: float, span: int, layer: int) -> None:
    """float16 is computed in float32; what is rounded are values and outputs."""
    case = Case(140, 32, "all", layer=layer, dtype=dtype)
    for ours, theirs in zip(case.ours(Tuning(overlap=False, span=span)), case.expected(), strict=True):
        assert apart(ours, theirs) < far


@pytest.mark.parametrize("keys", sorted(KEYS))
@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_products_in_bfloat16_are_as_near_as_its_digits_allow(decay: str, keys: str) -> None:
    case = Case(140, 32, decay, keys, dtype=torch.bfloat16)
    for ours, theirs in zip(case.ours(Tuning(overlap=False)), case.expected(), strict=True):
        assert off(ours, theirs) < 0.02


def test_a_state_in_float16_stops_at_its_largest_number() -> None:
    case = Case(40, 16, "weak")
    case.kv = case.kv.mul(1e5).clamp(-65504, 65504).half()
    case.rkv[1:] *= 300
    wide, (out, end) = case.expected(), case.ours(SHORT)
    assert bool((wide[1].abs() > 65520).any())
    assert apart(end.double(), wide[1].clamp(-65504, 65504)) < 1e-3
    assert bool((end.abs() <= 65504).all())
    assert apart(out, wide[0]) < 1e-5

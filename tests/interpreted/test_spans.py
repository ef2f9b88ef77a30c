"""RWKV-6's WKV for many tokens at once does what the recurrence does, whatever the decays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import apart
from rwkv_backends.kernels import spans6
from rwkv_backends.kernels.tuning import Tuning
from test_kernels import DECAYS, gated, recurrence
from torch import Tensor

B, H, D = 2, 2, 5
SHORT = Tuning(overlap=False, span=32)


class Case:
    """Inputs for B * T tokens, in the order that the kernels take them, and what comes out by the definition."""

    def __init__(self, T: int, N: int, decay: tuple[float, float], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(T)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.kvrg, low, w = draw(4, B * T, H * N).to(dtype), draw(B * T, D), draw(H * N, D)
        middle, reach = sum(decay) / 2, (decay[1] - decay[0]) / 2
        w *= reach / w.abs().sum(1, keepdim=True)  # decay + W tanh(low) is between the two
        base = torch.full((H * N,), middle)
        self.decay = low, w, base
        self.u, self.norm, self.kv = draw(H, N), (draw(H, N), draw(H, N)), draw(B + 1, H, N, N)
        self.w = torch.exp(-torch.exp(base.double() + torch.tanh(low.double()) @ w.double().t()))

    def expected(self) -> tuple[Tensor, Tensor]:
        o, end = recurrence(self.kvrg, self.w, self.u, self.kv[:B])
        return gated(o, self.kvrg[3], self.norm), end

    def ours(self, tuning: Tuning, like: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        kv = self.kv.clone()
        out = spans6.wkv(self.kvrg, *self.decay, self.u, self.norm, kv[:B], torch.empty(0, dtype=like), tuning)
        assert out.dtype == like
        assert torch.equal(kv[B], self.kv[B])
        return out, kv[:B]


@pytest.mark.parametrize("T", [2, 32, 77])
@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_it_is_the_recurrence(decay: str, T: int) -> None:
    case = Case(T, 32, DECAYS[decay])
    for ours, theirs in zip(case.ours(SHORT), case.expected(), strict=True):
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("span", [16, 64, 128])
@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 1e-5), (torch.bfloat16, 0.01)], ids=str)
def test_spans_of_any_length_and_halves_give_the_same(dtype: torch.dtype, far: float, span: int) -> None:
    """float16 is computed in float32."""
    case = Case(140, 16, (-8, 3), dtype)
    for ours, theirs in zip(case.ours(replace(SHORT, span=span)), case.expected(), strict=True):
        assert apart(ours, theirs) < far
    assert case.ours(SHORT, dtype)[0].dtype == dtype


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_products_in_bfloat16_are_as_near_as_its_digits_allow(decay: str) -> None:
    case = Case(140, 32, DECAYS[decay], torch.bfloat16)
    for ours, theirs in zip(case.ours(Tuning(overlap=False)), case.expected(), strict=True):
        assert apart(ours, theirs) < 0.01


def test_a_state_in_float16_stops_at_its_largest_number() -> None:
    case = Case(40, 16, (-100.0, -100.0))
    case.kv = case.kv.mul(1e5).clamp(-65504, 65504).half()
    wide, (out, end) = case.expected(), case.ours(SHORT)
    assert bool((wide[1].abs() > 65520).any())
    torch.testing.assert_close(end, wide[1].clamp(-65504, 65504).half())
    assert apart(out, wide[0]) < 1e-5
    case.kv[0, 0, 0, 0] = torch.nan
    assert bool(case.ours(SHORT)[1][0, 0, 0, 0].isnan())  # it does not hide as a number


def test_a_decay_of_zero_forgets_all_and_of_one_keeps_all() -> None:
    zero, one = Case(40, 16, (100.0, 100.0)), Case(40, 16, (-100.0, -100.0))
    k, v = (part.view(B, 40, H, 16).transpose(1, 2) for part in zero.kvrg[:2])  # [B, H, T, N]
    torch.testing.assert_close(zero.ours(SHORT)[1], k[:, :, -1, :, None] * v[:, :, -1, None])
    k, v = (part.view(B, 40, H, 16).transpose(1, 2) for part in one.kvrg[:2])
    torch.testing.assert_close(one.ours(SHORT)[1], one.kv[:B] + k.transpose(2, 3) @ v)


@pytest.mark.parametrize("least", [0, 1, 7, 80])
@pytest.mark.parametrize("decay", ["usual", "all"])
def test_spans_may_be_halved_as_often_as_one_likes(decay: str, least: int) -> None:
    """Some are halved until blocks of two are left, or not at all, and some until decays can be divided by."""
    case = Case(77, 16, DECAYS[decay])
    for ours, theirs in zip(case.ours(replace(SHORT, least_decay=least, span=64)), case.expected(), strict=True):
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("ahead", [1, 4])
def test_states_asked_for_ahead_change_nothing(ahead: int) -> None:
    case = Case(77, 16, DECAYS["usual"])
    for ours, theirs in zip(case.ours(replace(SHORT, carry_ahead=ahead)), case.expected(), strict=True):
        assert apart(ours, theirs) < 1e-5

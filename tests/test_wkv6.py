"""The WKV recurrence in chunks is the recurrence one token at a time, whatever the decays."""

from __future__ import annotations

import pytest
import torch
from helpers import apart
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rwkv_layers.wkv6 import wkv_chunked, wkv_step
from torch import Tensor

DECAYS = {
    "usual": (-3.0, 0.5),  # log w = -e^x for x between these
    "strong": (2.0, 3.0),
    "dead": (5.0, 80.0),
    "weak": (-30.0, -10.0),
    "all": (-20.0, 6.0),
}


def inputs(B: int, T: int, H: int, N: int, decay: str, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(B, T, H, N, generator=draw) for _ in range(3))
    log_w = -torch.exp(torch.empty(B, T, H, N).uniform_(*DECAYS[decay], generator=draw))
    return [r, k, v, log_w, torch.randn(H, N, generator=draw), torch.randn(B, H, N, N, generator=draw)]


def recurrence(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    r, k, v, log_w, u, s = (t.double() for t in (r, k, v, log_w, u, s))
    outs = []
    for t in range(r.shape[1]):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s + u[None, :, :, None] * kv))
        s = log_w[:, t].exp()[..., None] * s + kv
    return torch.stack(outs, 1), s


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 8]),
    st.sampled_from(sorted(DECAYS)),
    st.integers(0, 99),
)
@example(1, 16, 1, 64, "all", 0)
@example(2, 33, 2, 64, "strong", 1)
@example(1, 513, 1, 16, "weak", 2)
@example(4, 200, 4, 64, "all", 3)  # more than one slab, the last one with places to spare
@example(4, 256, 4, 64, "usual", 4)
def test_chunks_equal_steps(B: int, T: int, H: int, N: int, decay: str, seed: int) -> None:
    given_inputs = inputs(B, T, H, N, decay, seed)
    before = [t.clone() for t in given_inputs]
    expected, end = recurrence(*given_inputs)
    r, k, v, log_w, bonus, state = (t.clone() for t in given_inputs)
    terms = recurrence(r.abs(), k.abs(), v.abs(), log_w, bonus.abs(), state.abs())  # which may cancel out
    out = wkv_chunked(*given_inputs)
    for ours, exact, size in zip((out, given_inputs[-1]), (expected, end), terms, strict=True):
        assert (ours - exact).abs().max() < 1e-5 * size.max()
    assert all(torch.equal(a, b) for a, b in zip(given_inputs[:-1], before[:-1], strict=True))


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_one_step_equals_the_recurrence(decay: str) -> None:
    given_inputs = inputs(3, 1, 2, 8, decay, 0)
    before = [t.clone() for t in given_inputs]
    expected, end = recurrence(*given_inputs)
    out = wkv_step(*given_inputs)
    assert apart(out, expected) < 1e-6
    assert apart(given_inputs[-1], end) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(given_inputs[:-1], before[:-1], strict=True))


@pytest.mark.parametrize("T", [1, 40])
def test_half_inputs_are_computed_in_float32(T: int) -> None:
    *rest, s = inputs(2, T, 2, 8, "usual", 5)
    r, k, v = (t.bfloat16() for t in rest[:3])
    expected, end = recurrence(r, k, v, *rest[3:], s)
    out = (wkv_step if T == 1 else wkv_chunked)(r, k, v, *rest[3:], s)
    assert out.dtype == torch.float32
    assert apart(out, expected) < 1e-5
    assert apart(s, end) < 1e-5


def test_a_decay_of_zero_forgets_all_and_of_one_keeps_all() -> None:
    r, k, v, log_w, u, s = inputs(1, 20, 1, 4, "usual", 0)
    start, last = s.clone(), k[:, -1, :, :, None] * v[:, -1, :, None]
    out = wkv_chunked(r, k, v, torch.full_like(log_w, -torch.inf), u, s)
    torch.testing.assert_close(s, last)
    assert bool(out.isfinite().all())
    wkv_chunked(r, k, v, torch.zeros_like(log_w), u, s)
    torch.testing.assert_close(s, last + torch.einsum("bthk,bthv->bhkv", k, v))
    wkv_step(r[:, :1], k[:, :1], v[:, :1], torch.full_like(log_w[:, :1], -torch.inf), u, start)
    torch.testing.assert_close(start, k[:, 0, :, :, None] * v[:, 0, :, None])


def test_decays_that_vanish_leave_no_subnormal_numbers() -> None:
    """They would be slow: a chunk's products run down through them wherever decays are strong."""
    r, k, v, log_w, u, s = inputs(1, 64, 2, 8, "usual", 0)
    s.zero_()
    out = wkv_chunked(r, k, v, torch.full_like(log_w, -9.0), u, s)
    expected = recurrence(r, k, v, torch.full_like(log_w, -9.0), u, torch.zeros_like(s))[0]
    assert apart(out, expected) < 1e-5
    tiny = torch.finfo(torch.float32).tiny
    assert not bool(((s != 0) & (s.abs() < tiny)).any())

"""The WKV recurrence of RWKV-7 in chunks is the recurrence one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rwkv_layers.wkv7 import wkv_chunked, wkv_step
from torch import Tensor

DECAYS = {
    "usual": (-6.0, 1.0),  # log w = -e^-0.5 sigmoid(x) for x between these
    "strong": (5.0, 30.0),  # w = 0.545, the strongest there is
    "weak": (-40.0, -10.0),
    "all": (-20.0, 20.0),
}
KEYS = {
    "usual": (1.0, 2.0),  # spread of the keys around one common key, spread of the rates' logits
    "alike": (0.05, 2.0),
    "alike and all replaced": (0.01, 50.0),
}


def inputs(B: int, T: int, H: int, N: int, decay: str, keys: str, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    r, k, v, noise, rate = (torch.randn(B, T, H, N, generator=draw) for _ in range(5))
    w = torch.exp(-math.exp(-0.5) * torch.empty(B, T, H, N).uniform_(*DECAYS[decay], generator=draw).sigmoid())
    spread, certainty = KEYS[keys]
    common = torch.randn(B, 1, H, N, generator=draw)
    kappa = F.normalize(common + spread * noise, dim=-1)
    rate = torch.sigmoid(certainty * rate + (certainty > 10) * 100)
    return [r, w, k, v, -kappa, kappa * rate, torch.randn(B, H, N, N, generator=draw)]


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference relative to the largest value, or to the inputs', which are about 1.

    Where one key is replaced again and again, all that was written may cancel out.
    """
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)).item()


def recurrence(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    r, w, k, v, a, b, s = (t.double() for t in (r, w, k, v, a, b, s))
    outs = []
    for t in range(r.shape[1]):
        change = torch.diag_embed(w[:, t]) + b[:, t, :, :, None] * a[:, t, :, None]
        s = change @ s + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s))
    return torch.stack(outs, 1), s


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 8]),
    st.sampled_from(sorted(DECAYS)),
    st.sampled_from(sorted(KEYS)),
    st.integers(0, 99),
)
@example(1, 16, 1, 64, "all", "usual", 0)
@example(2, 17, 2, 64, "strong", "alike", 1)
@example(1, 513, 1, 16, "weak", "alike and all replaced", 2)
@example(1, 2000, 1, 64, "usual", "usual", 3)
def test_chunks_equal_steps(B: int, T: int, H: int, N: int, decay: str, keys: str, seed: int) -> None:
    given_inputs = inputs(B, T, H, N, decay, keys, seed)
    before = [t.clone() for t in given_inputs]
    expected, end = recurrence(*given_inputs)
    out, state = wkv_chunked(*given_inputs)
    assert off(out, expected) < 1e-5
    assert off(state, end) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(given_inputs, before, strict=True))


@pytest.mark.parametrize("decay", sorted(DECAYS))
@pytest.mark.parametrize("keys", sorted(KEYS))
def test_one_step_equals_the_recurrence(decay: str, keys: str) -> None:
    given_inputs = inputs(3, 1, 2, 8, decay, keys, 0)
    expected, end = recurrence(*given_inputs)
    out, state = wkv_step(*given_inputs)
    assert off(out, expected) < 1e-6
    assert off(state, end) < 1e-6


def test_a_key_written_again_replaces_what_was_there() -> None:
    """Without decay, at a rate of 1: the state becomes a memory that holds the last value of each key."""
    _, w, _, v, _, _, s = inputs(1, 40, 1, 8, "weak", "usual", 0)
    keys = torch.eye(8).repeat(5, 1).view(1, 40, 1, 8)
    _, state = wkv_chunked(keys, torch.ones_like(w), keys, v, -keys, keys, s)
    torch.testing.assert_close(state[0, 0], v[0, -8:, 0], rtol=1e-5, atol=1e-5)

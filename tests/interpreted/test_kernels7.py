"""RWKV-7's chunked delta rule does what the recurrence does, whatever the decays."""

from __future__ import annotations

import pytest
import torch
from helpers import apart
from rwkv_backends.kernels import chunk7
from rwkv_backends.kernels.tuning import Tuning
from torch import Tensor

B, H = 2, 2
DECAYS = {"forgets": (0.0, 0.0), "usual": (0.545, 1.0), "all": (0.0, 1.0), "keeps": (1.0, 1.0)}
"""w is between these: RWKV-7's own are from 0.545 to 1."""


def inputs(T: int, N: int, decay: str, repeated: bool) -> list[Tensor]:
    """r, w, k, v, a, b [B*T, H*N] and a state: a = -kappa, b = kappa rate, of unit vectors kappa."""
    draw = torch.Generator().manual_seed(T)
    r, k, v, kappa = (torch.randn(B * T, H, N, generator=draw) for _ in range(4))
    if repeated:  # the same key again and again: where powers of the matrix would lose digits
        kappa = kappa[:1].expand(B * T, H, N)
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    rate = torch.rand(B * T, H, N, generator=draw)
    w = torch.empty(B * T, H, N).uniform_(*DECAYS[decay], generator=draw)
    rows = [t.reshape(B * T, H * N) for t in (r, w, k / N**0.5, v, -kappa, kappa * rate)]
    return [*rows, torch.randn(B, H, N, N, generator=draw)]


def recurrence(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    N = s.shape[-1]
    r, w, k, v, a, b = (t.double().view(B, -1, H, N) for t in (r, w, k, v, a, b))
    s, outs = s.double(), []
    for t in range(r.shape[1]):
        seen = torch.einsum("bhk,bhkv->bhv", a[:, t], s)
        s = w[:, t][..., None] * s + b[:, t][..., None] * seen[:, :, None] + k[:, t][..., None] * v[:, t][:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s))
    return torch.stack(outs, 1).reshape(-1, H * N), s


@pytest.mark.parametrize("T", [2, 16, 35])
@pytest.mark.parametrize("decay", sorted(DECAYS))
@pytest.mark.parametrize("repeated", [False, True], ids=["", "repeated keys"])
def test_chunks_equal_the_recurrence(T: int, decay: str, repeated: bool) -> None:
    given = inputs(T, 16, decay, repeated)
    expected, end = recurrence(*given)
    out = chunk7.wkv_chunked(*given, Tuning(span=16))
    assert apart(out, expected) < 1e-5
    assert apart(given[-1], end) < 1e-5


@pytest.mark.parametrize("tuning", [Tuning(chunk=32), Tuning(state_cols=16, span=16)], ids=["long", "narrow"])
def test_the_sizes_of_chunks_and_blocks_change_nothing(tuning: Tuning) -> None:
    given = inputs(50, 32, "usual", False)
    expected, end = recurrence(*given)
    assert apart(chunk7.wkv_chunked(*given, tuning), expected) < 1e-5
    assert apart(given[-1], end) < 1e-5

"""Training's kernels for the factors of a chunk: right through the interpreter, gradients too, whatever the decays."""

from __future__ import annotations

import pytest
import torch
from helpers import apart
from torch import Tensor

from training import factors as plain
from training import wkv_kernels
from training.wkv import wkv, wkv_recurrence

H = 2
DECAYS = {"strong": (-30.0, -20.0), "weak": (-1e-6, 0.0), "usual": (-2.0, -1e-3)}


def inputs(B: int, T: int, N: int, decays: str) -> list[Tensor]:
    """r, k, v, lw [B, T, H, N] and u [H, N]."""
    draw = torch.Generator().manual_seed(T)
    r, k, v = (torch.randn(B, T, H, N, generator=draw) for _ in range(3))
    if decays == "far apart":
        lw = torch.where(torch.randn(r.shape, generator=draw) > 0, -20.0, -1e-6)
    else:
        lw = torch.empty(r.shape).uniform_(*DECAYS[decays], generator=draw)
    return [r, k, v, lw, torch.randn(H, N, generator=draw)]


def with_gradients(out: Tensor, given: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, given, direction.to(out.dtype))]


@pytest.mark.parametrize(("B", "T", "N", "chunk"), [(1, 33, 16, 32), (1, 20, 64, 16), (2, 9, 8, 4)])
@pytest.mark.parametrize("decays", [*DECAYS, "far apart"])
def test_wkv_by_kernels_is_the_recurrence(B: int, T: int, N: int, chunk: int, decays: str) -> None:
    given = [x.requires_grad_() for x in inputs(B, T, N, decays)]
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = with_gradients(wkv_recurrence(*exact), exact)
    r, k, v, lw, u = given
    for name, value, reference in zip(
        ["out", *"rkv", "lw", "u"], with_gradients(wkv(r, k, v, lw, u, chunk, True), given), expected, strict=True
    ):
        # A gradient that all but vanishes is a difference of terms of order 1.
        assert (value - reference).abs().max() < 5e-5 * reference.abs().max().clamp(min=1.0), name


def test_kernels_do_what_plain_torch_does_with_bfloat16() -> None:
    r, k, _, lw, u = inputs(2, 32, 64, "usual")
    r, k = r.bfloat16(), k.bfloat16()
    results = plain.factors(r, k, lw, u, 32)
    for value, reference in zip(wkv_kernels.factors(r, k, lw, u, 32), results, strict=True):
        assert value.shape == reference.shape
        assert apart(value, reference) < 1e-5
    towards = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) for x in results]
    expected = plain.factor_gradients(r, k, lw, u, *towards, 32)
    for value, reference in zip(wkv_kernels.factor_gradients(r, k, lw, u, *towards, 32), expected, strict=True):
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype)
        assert apart(value, reference) < (0.01 if value.dtype == torch.bfloat16 else 1e-5)

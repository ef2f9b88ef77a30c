"""The kernels between the products of a prompt do what their naive twins do, on lengths off the tokens of a program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawn import TUNING, B, C, Draw, R, assert_close, normed, shifted
from rwkv_backends.kernels import mixing, tokens
from rwkv_backends.kernels.tokens import Shift


@pytest.fixture(params=[2, 4])
def program(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("T", [1, 2, 7])
def test_shift(dtype: torch.dtype, T: int, program: int) -> None:
    draw, tuning = Draw(dtype), replace(TUNING, tokens=program)
    x, prev, norm, maa = draw(B * T, C), draw(B, C), draw.norm(), (draw(C), draw(C))
    e = normed(x, norm)
    dx = shifted(e, prev, T)
    for to in (maa, (None, maa[1]), maa[1:], (*maa, *draw(4, C))):
        last = torch.empty_like(prev)
        out = tokens.shift(x, Shift(prev, norm, to, last), tuning)
        twins = torch.stack([e if one is None else e + dx * one.double() for one in to])
        assert_close(dtype, (out, twins), (last, e.view(B, T, C)[:, -1]))


@pytest.mark.parametrize("T", [1, 2, 7])
def test_gate_and_shift(dtype: torch.dtype, T: int, program: int) -> None:
    draw, tuning = Draw(dtype), replace(TUNING, tokens=program)
    M = B * T
    r, v, x, prev, last = draw(M, C), draw(M, C), draw(M, C), draw(B, C), draw(B, C)
    before, to = x.clone(), Shift(prev, draw.norm(), (None, draw(C)), last)
    twin = (x.double() + torch.sigmoid(r.double()) * v.double()) * 0.5
    out, (a, b) = tokens.gate_shift(r, v, x, 0.5, to, tuning)
    alone = tokens.gate(r, v, x, 0.5, tuning)
    assert torch.equal(x, before)
    assert torch.equal(out, alone)
    e = normed(out, to.norm)
    dx = shifted(e, prev, T)
    assert to.maa[1] is not None
    assert_close(dtype, (out, twin), (a, e), (b, e + dx * to.maa[1].double()), (last, e.view(B, T, C)[:, -1]))


@pytest.mark.parametrize("T", [1, 7, 18])
def test_mixtures_of_what_is_shifted_there(dtype: torch.dtype, T: int) -> None:
    draw = Draw(dtype)
    e, prev, w, lora = draw(B * T, C), draw(B, C), draw(5, R + 1, C), draw(B * T, 5 * R)
    before, dx = prev.clone(), shifted(e.double(), prev, T)
    mixed = mixing.lerps(lora, e, w, prev, T, TUNING)
    low = torch.tanh(lora.double()).view(B * T, 5, R).transpose(0, 1)
    assert_close(dtype, (mixed, e.double() + dx * (torch.bmm(low, w.double()[:, :R]) + w.double()[:, R:])))
    assert torch.equal(prev, before)

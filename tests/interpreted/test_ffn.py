"""Channel mixing as one kernel, and a small one after it, says what its definition says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawn import TUNING, B, C, Draw, assert_close, normed, shifted, stored
from helpers import apart
from rwkv_backends.kernels.ffn import channel_mixing
from rwkv_layers.linear import Matrix

WIDTHS = [3, 70]  # fewer rows than a tile has, and no whole number of tiles


@pytest.mark.parametrize(("programs", "key_rows", "key_ahead"), [(2, 16, 2), (7, 8, 2), (100, 4, 2), (2, 8, 4)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("sign", [-1, 0, 1], ids=["all zero", "some zero", "none zero"])
def test_channel_mixing_in_one(
    dtype: torch.dtype, sign: int, gated: bool, int8: bool, width: int, programs: int, key_rows: int, key_ahead: int
) -> None:
    """Whichever inputs of the value matrix are zero, with a receptance and without."""
    draw = Draw(dtype)
    x, prev, norm, maa = draw(B, C), draw(B, C), draw.norm(), (draw(C), draw(C))
    keys = draw.matrix(width, C)
    if sign:  # inputs of one sign, and weights of one
        norm, prev, keys = (torch.zeros_like(norm[0]), norm[1].abs()), prev.abs(), keys.abs() * sign
        maa = maa[0].clamp(0, 1), maa[1]
    (key, key_w), (receptance, receptance_w) = (stored(w, int8) for w in (keys, draw.matrix(C, C)))
    (value, scale), value_w = stored(draw(C, width), int8)
    e = normed(x, norm)
    dx = shifted(e, prev, 1)
    k = torch.relu((e + dx * maa[0].double()) @ key_w.t()) ** 2
    assert bool({-1: (k == 0).all(), 0: (k == 0).any() & (k > 0).any(), 1: (k > 0).all()}[sign])
    r = torch.sigmoid((e + dx * maa[1].double()) @ receptance_w.t()) if gated else 1.0
    twin = (x.double() + r * (k @ value_w.t())) * 0.5
    turned = Matrix(value.t().contiguous(), scale)
    shift, tuning = maa if gated else (maa[0], None), TUNING
    tuning = replace(tuning, programs=programs, key_rows=key_rows, key_ahead=key_ahead)
    channel_mixing(x, prev, norm, shift, key, receptance if gated else None, turned, 0.5, tuning)
    assert_close(dtype, (x, twin))
    assert apart(prev, e) < (1e-6 if dtype == torch.float32 else 0.01)


def test_weights_of_zero_inputs_are_not_read() -> None:
    """NaN in their place goes unnoticed."""
    draw = Draw(torch.float32)
    x, prev, norm, maa, keys, value = draw(1, C), draw(1, C), draw.norm(), draw(C), draw.matrix(70, C), draw(70, C)
    e = normed(x, norm)
    zero = ((e + shifted(e, prev, 1) * maa.double()) @ keys.double().t())[0] <= 0
    value[zero] = torch.nan
    channel_mixing(x, prev, norm, (maa, None), Matrix(keys, None), None, Matrix(value, None), 1.0, TUNING)
    assert bool(zero.any())
    assert bool(x.isfinite().all())

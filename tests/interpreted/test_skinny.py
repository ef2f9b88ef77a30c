"""Products of some rows do what their naive twins do, whatever their sizes, and models of them as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from drawn import TUNING, C, D, Draw, assert_close, stored
from rwkv_backends.kernels import skinny

SKINNY = replace(TUNING, skinny_cols=16)  # of 40 columns, three tiles; of few rows in 8 bits two
ROWS = [3, 16, 19]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "programs"), [(D, 1), (D, 2), (150, 132)], ids=str)
def test_the_parts_of_a_product_add_up(
    dtype: torch.dtype, int8: bool, rows: int, width: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skinny, "PROGRAMS", programs)
    draw = Draw(dtype)
    x, (matrix, w) = draw(rows, C), stored(draw.matrix(width, C), int8)
    parts = skinny.parts(x, matrix, SKINNY)
    turns = 2 if int8 and rows <= 16 else 3
    assert parts.shape == (min(turns, 3 if programs == 132 else programs), rows, width)
    assert_close(dtype, (parts.sum(0), x.double() @ w.t()))


@pytest.mark.parametrize("then", ["", "square"])
@pytest.mark.parametrize("rows", ROWS)
def test_several_products_beside_another(dtype: torch.dtype, int8: bool, rows: int, then: str) -> None:
    draw, n, width = Draw(dtype), 3, 70
    x, other_x = draw(n, rows, C), draw(rows, C)
    matrices, w = stored(torch.stack([draw.matrix(width, C) for _ in range(n)]), int8)
    other, other_w = stored(draw.matrix(D, C), int8)
    out, other_out = skinny.pair(x, matrices, then, other_x, other, torch.float32, SKINNY)
    twin = torch.bmm(x.double(), w.transpose(1, 2))
    assert other_out.dtype == torch.float32
    assert_close(dtype, (out, twin.relu() ** 2 if then else twin), (other_out, other_x.double() @ other_w.t()))


def test_adapters_in_float32_are_multiplied_so(dtype: torch.dtype) -> None:
    """As a CPU has them; x may be narrower."""
    draw = Draw(dtype)
    x, (matrix, w) = draw(3, C), stored(Draw(torch.float32).matrix(D, C), False)
    assert_close(torch.float32, (skinny.parts(x, matrix, SKINNY).sum(0), x.double() @ w.t()))

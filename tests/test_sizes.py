"""Sizes of grids and tiles, worked out on the host as Triton's functions of these names do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_backends.kernels import sizes

triton = pytest.importorskip("triton", reason="Triton is not installed")


@given(st.integers(0, 1 << 30), st.integers(1, 1 << 20))
def test_they_are_triton_s(a: int, b: int) -> None:
    assert sizes.cdiv(a, b) == triton.cdiv(a, b)
    assert sizes.next_power_of_2(b) == triton.next_power_of_2(b)

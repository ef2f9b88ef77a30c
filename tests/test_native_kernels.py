"""What the native backend's C is made of, for this processor and for lesser ones, against float64."""

from __future__ import annotations

import ctypes
import math
import platform
from ctypes import byref, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import apart
from rwkv_backends.native import Native, build
from rwkv_backends.native.structs import DTYPES, Packer
from torch import Tensor

pytestmark = pytest.mark.skipif(Native().why_not(None) is not None, reason=str(Native().why_not(None)))

PROCESSORS = {"this": (), "without bfloat16": ("-DNO_BFLOAT16_DOT",)}
if platform.machine() == "x86_64":  # each runs on all later ones; none of these has more than this one
    PROCESSORS |= {"x86-64": ("-march=x86-64",)}
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        # As for a Zen 3, for which gcc would add some products in one rounding and others in two.
        zen3 = ("-march=x86-64-v3", "-mtune=znver3")
        PROCESSORS |= {"x86-64-v3": zen3, "x86-64-v4": ("-march=x86-64-v4",)}
ROUNDED = 6e-3
"""Where vectors are rounded to bfloat16 before they are multiplied, as torch rounds them."""


@pytest.fixture(scope="module", params=PROCESSORS, ids=str)
def processor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kernels(processor: str) -> ctypes.CDLL:
    source = Path(__file__).with_name("native_kernels.c")
    return build.library(str(source), (f"-I{build.SOURCES}", *PROCESSORS[processor]))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def weights(dtype: torch.dtype, rows: int, cols: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A matrix, its scales where it is int8, and what it stands for in float64."""
    if dtype != torch.int8:
        weight = random(rows, cols).to(dtype)
        return weight, None, weight.double()
    weight = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.5
    return weight, scale, weight.double() * scale.double()[:, None]


def address(t: Tensor) -> c_void_p:
    assert t.is_contiguous()
    return c_void_p(t.data_ptr())


@pytest.mark.parametrize("cols", [1, 15, 64, 100, 257, 2101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_times_vectors(dtype: torch.dtype, cols: int, kernels: ctypes.CDLL, processor: str) -> None:
    """Any part of the rows, any number of vectors, which stay in the nearest cache or do not; the same to the bit alone
    and beside others."""
    weight, scale, exact = weights(dtype, 23, cols)
    packer = Packer()
    matrix = packer.matrix(weight, scale)
    x = random(16, cols)
    alone = torch.empty(16, 23)
    packed = torch.empty(16 * (cols + 64))

    def times(first: int, last: int, x: Tensor, n: int, out: Tensor) -> None:
        rows = c_int64(first), c_int64(last)
        kernels.times(byref(matrix), *rows, address(x), c_int64(n), address(out), address(packed))

    for b in range(16):
        times(0, 23, x[b], 1, alone[b])
    for n in range(1, 17):
        for first, last in ((0, 23), (5, 6), (7, 18), (22, 23), (4, 4)):
            out = torch.full((n, 23), 7.0)
            times(first, last, x, n, out)
            assert torch.equal(out[:, first:last], alone[:n, first:last])
            assert (out[:, :first] == 7).all()
            assert (out[:, last:] == 7).all()
    rounds = dtype == torch.bfloat16 and processor == "this"
    assert apart(alone, x.double() @ exact.t()) < (ROUNDED if rounds else 1e-6)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.int8], ids=str)
def test_sums_of_columns(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    weight, _, exact = weights(dtype, 12, 150)
    packer = Packer()
    matrix = packer.matrix(weight)
    x = random(16, 20)
    for n in (1, 2, 5, 16):
        for first, last in ((0, 150), (64, 128), (3, 75), (149, 150), (9, 9)):
            out = random(n, 150)
            expected = out.double()
            expected[:, first:last] += x[:n, 4:9].double() @ exact[3:8, first:last]
            kernels.plus_columns(
                byref(matrix), c_int64(3), c_int64(5), c_int64(first), c_int64(last), c_void_p(x[0, 4:].data_ptr()),
                c_int64(20), c_int64(n), address(out),
            )  # fmt: skip
            assert apart(out, expected) < 1e-6
            assert torch.equal(out[:, :first].double(), expected[:, :first])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_as_float32(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    weight, scale, exact = weights(dtype, 5, 37)
    if dtype == torch.float16:  # the smallest, subnormal and largest it has
        weight[3, :4] = torch.tensor([6e-8, -5e-6, 65504.0, 6.2e-5])
        exact = weight.double()
    packer = Packer()
    out = torch.empty(37)
    kernels.row(byref(packer.matrix(weight, scale)), c_int64(3), address(out))
    assert torch.equal(out, exact[3].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_last_input_is_kept_as_torch_rounds_it(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    x = torch.cat(
        [random(70) * 3, torch.tensor([0.0, -0.0, 1e-7, -6e-6, 3e-5, 65519.0, 1.00390625, torch.nan, torch.inf])]
    )
    prev, dx = random(len(x)).to(dtype), torch.empty(len(x))
    expected = prev.float() - x
    kernels.exchange(c_int64(DTYPES[dtype]), address(prev), address(x), address(dx), c_int64(len(x)))
    torch.testing.assert_close(dx, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(prev, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def functions(kernels: ctypes.CDLL, x: Tensor) -> list[Tensor]:
    outs = [x.clone() for _ in range(7)]
    kernels.functions(c_int64(len(x)), *map(address, outs))
    return outs


def test_functions_of_many_numbers(kernels: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-87, 88, 5003), torch.linspace(-1, 1, 2000)])
    e, s, t, g, d, b, r = functions(kernels, x)
    z = x.double()
    assert (e / z.exp() - 1).abs().max() < 3e-7
    assert (s - z.sigmoid()).abs().max() < 2e-7
    assert (t - z.tanh()).abs().max() < 2e-7
    assert ((g - F.silu(z)) / (1 + z.abs())).abs().max() < 3e-7
    assert (d - torch.exp(-z.exp())).abs().max() < 3e-7
    assert (b - torch.exp(-math.exp(-0.5) * z.sigmoid())).abs().max() < 3e-7
    assert torch.equal(r, x.relu().square())


def test_functions_of_what_is_far_out(kernels: ctypes.CDLL) -> None:
    far = torch.tensor([-1e4, 1e4, -torch.inf, torch.inf, torch.nan])
    e, s, t, _, d, b, r = functions(kernels, far)
    assert e[:4].isfinite().all()
    assert s[:4].tolist() == pytest.approx([0, 1, 0, 1], abs=1e-30)
    assert t[:4].tolist() == [-1, 1, -1, 1]
    assert d[:4].tolist() == pytest.approx([1, 0, 1, 0], abs=1e-30)
    assert b[:4].tolist() == pytest.approx([1, math.exp(-math.exp(-0.5))] * 2)
    assert r[:4].tolist() == [0, 1e8, 0, torch.inf]
    assert all(f[4].isnan() for f in (e, s, t, d, b, r))

"""Products in the form the processor does best are the products of F.linear, in every shape and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import apart
from rwkv_layers import linear as module
from rwkv_layers.linear import Matrix, linear, linears, times
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [(1,), (1, 1), (2,), (3, 1), (64,), (65,), (1, 130), (2, 33)]


@pytest.fixture(autouse=True, params=[module.with_amx, module.without_amx], ids=lambda fewest: fewest.__name__)
def fewest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX, and as on one without."""
    monkeypatch.setattr(module, "fewest", request.param)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("leading", SHAPES, ids=str)
@pytest.mark.parametrize("D", [1, 7, 96])
def test_linear_is_f_linear(D: int, leading: tuple[int, ...], scripted: bool, dtype: torch.dtype) -> None:
    x, weight = random(dtype, *leading, 48), random(dtype, D, 48)
    ours = (torch.jit.script(linear) if scripted else linear)(x, Matrix(weight, None))
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert apart(ours, F.linear(x.double(), weight.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("M", [1, 2, 64, 65, 130])
def test_linears_are_several_of_them(M: int, dtype: torch.dtype) -> None:
    x, weight = random(dtype, 4, M, 48), random(dtype, 4, 40, 48)
    ours = linears(x, Matrix(weight, None))
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    for i in range(4):
        assert apart(ours[i], F.linear(x[i].double(), weight[i].double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("M", [1, 2, 130])
def test_times_is_a_matrix_product(M: int, dtype: torch.dtype) -> None:
    x, weight = random(dtype, M, 48), random(dtype, 40, 48)
    for columns in (x.t(), x.t().contiguous()):
        ours = times(Matrix(weight, None), columns)
        assert ours.dtype == dtype
        assert apart(ours, weight.double() @ x.t().double()) < TOLERANCE[dtype]


def test_a_vector_that_is_a_column_of_something_else() -> None:
    weight, others = random(torch.bfloat16, 40, 48), random(torch.bfloat16, 48, 3)
    expected = weight.double() @ others[:, 1].double()
    assert apart(linear(others[:, 1], Matrix(weight, None)), expected) < 1e-2
    assert apart(times(Matrix(weight, None), others[:, 1:2]), expected[:, None]) < 1e-2

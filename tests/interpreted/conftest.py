"""Kernels through Triton's interpreter: only in a process of their own, which `tests/test_fused.py` starts.

Triton reads TRITON_INTERPRET when it is imported, and then neither compiles for a GPU nor leaves torch.compile alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import TUNING
from rwkv_backends.fused import interpreted
from rwkv_backends.kernels.tuning import Tuning

collect_ignore_glob = [] if interpreted() else ["test_*.py"]


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products as tensor cores have them: of bfloat16, and the same for each row wherever in the tile it is.

    The interpreter multiplies the bits of bfloat16 as whole numbers, and all else by numpy's BLAS, which on some
    processors adds up the sixth row in another order than the first.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(a: TensorHandle) -> np.ndarray:
        return (a.data.astype(np.uint32) << 16).view(np.float32) if a.dtype.scalar == tl.bfloat16 else a.data

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: object):
        product = np.einsum("ij,jk->ik", widened(a), widened(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """All memory that a kernel is to write begins as NaN: a place left out shows."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["dense", "int8"])
def int8(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def tuning(request: pytest.FixtureRequest) -> Tuning:
    """Rows held as one piece and as two: 32 and 8 of 40 columns, with fewer sums at once."""
    return replace(TUNING, pieces_from=1, together=2) if request.param else TUNING

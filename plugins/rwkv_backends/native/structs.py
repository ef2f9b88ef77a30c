"""The C structures that all versions share, filled from tensors. Whoever fills one keeps the tensors alive."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""`enum dtype` of numbers.h."""


class Matrix(ctypes.Structure):
    """`struct matrix` of matrix.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


class Norm(ctypes.Structure):
    """`struct norm` of layers.h."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Weighted(ctypes.Structure):
    """`struct model` of step.h."""

    _fields_ = [
        ("layers", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("rescale_every", ctypes.c_int64),
        ("emb", Matrix),
        ("ln0", Norm),
        ("ln_out", Norm),
        ("head", Matrix),
        ("layer", ctypes.c_void_p),
    ]


class StateTensor(ctypes.Structure):
    """`struct state` of layers.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("layer", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    ]


class Packer:
    """Turns tensors into what C reads, and keeps those it had to copy."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def vector(self, t: Tensor) -> int:
        """A small tensor as contiguous float32 -> its address."""
        t = t.float().contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def norm(self, weight: Tensor, bias: Tensor) -> Norm:
        return Norm(self.vector(weight), self.vector(bias))

    def matrix(self, weight: Tensor, scale: Tensor | None = None) -> Matrix:
        """weight [rows, cols], read where it is; int8 goes with a float32 scale [rows]."""
        weight = weight.contiguous()
        self.kept.append(weight)
        rows, cols = weight.shape
        return Matrix(
            weight.data_ptr(), None if scale is None else self.vector(scale), rows, cols, DTYPES[weight.dtype]
        )

    def matrices(self, weights: Tensor, scales: Tensor | None) -> list[Matrix]:
        """Several of one shape, [n, rows, cols] and [n, rows]."""
        each = [None] * len(weights) if scales is None else list(scales)
        return [self.matrix(weight, scale) for weight, scale in zip(weights, each, strict=True)]

    def layers(self, layers: ctypes.Array[Any]) -> int:
        """Those of a model, each a version's own structure -> their address."""
        self.kept.append(layers)
        return ctypes.addressof(layers)


def state_tensor(t: Tensor) -> StateTensor:
    """A tensor [L, B, ...] of the state; each row of a layer is contiguous (see `in_rows`)."""
    size = t.element_size()
    return StateTensor(t.data_ptr(), t.stride(0) * size, t.stride(1) * size, DTYPES[t.dtype])

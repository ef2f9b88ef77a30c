"""A row of C numbers in the registers of one program, as one piece or two.

A piece is a power of two, so that one piece of 4096 for a row of 2560 leaves three eighths of the threads idle; 2048
and 512 use them all. Each value here is a tuple of pieces. Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import store
from rwkv_backends.kernels.tuning import Tuning

WARP_COLS = 512
"""Columns of a row that a warp holds, as far as programs may be that large."""


@triton.jit
def columns(BLOCK: tl.constexpr, REST: tl.constexpr):
    cols = (tl.arange(0, BLOCK),)
    if REST:
        cols = cols + (BLOCK + tl.arange(0, REST),)
    return cols


@triton.jit
def load_row(ptr, cols, C: tl.constexpr):
    """As it is stored: what waits in registers should be small."""
    row = ()
    for i in tl.static_range(len(cols)):
        row = row + (tl.load(ptr + cols[i], mask=cols[i] < C, other=0.0),)
    return row


@triton.jit
def load_rows(ptr, rows, wanted, cols, C: tl.constexpr):
    """Those of a matrix of C columns that are wanted, the others zero: they cost no traffic."""
    tile = ()
    for i in tl.static_range(len(cols)):
        at = ptr + rows[:, None] * C + cols[i][None, :]
        tile = tile + (tl.load(at, mask=wanted[:, None] & (cols[i] < C)[None, :], other=0.0),)
    return tile


@triton.jit
def store_row(ptr, row, cols, C: tl.constexpr):
    for i in tl.static_range(len(cols)):
        store(ptr + cols[i], row[i], cols[i] < C)


@triton.jit
def widened(row):
    wide = ()
    for i in tl.static_range(len(row)):
        wide = wide + (row[i].to(tl.float32),)
    return wide


@triton.jit
def minus(a, b):
    left = ()
    for i in tl.static_range(len(a)):
        left = left + (a[i].to(tl.float32) - b[i],)
    return left


@triton.jit
def plus_product(x, a, b):
    """x + a b"""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i] + a[i] * b[i].to(tl.float32),)
    return y


@triton.jit
def times(w, x):
    """W x, for a few rows of W."""
    y = tl.sum(w[0].to(tl.float32) * x[0][None, :], 1)
    for i in tl.static_range(1, len(x)):
        y += tl.sum(w[i].to(tl.float32) * x[i][None, :], 1)
    return y


@triton.jit
def total(row):
    y = tl.sum(row[0], 0)
    for i in tl.static_range(1, len(row)):
        y += tl.sum(row[i], 0)
    return y


@triton.jit
def norm_of(x_ptr, weight, bias, cols, C: tl.constexpr):
    """Layer norm of the row at x_ptr, float32, rounded as the model keeps it: the state holds the same."""
    x = widened(load_row(x_ptr, cols, C))
    mean = total(x) / C
    apart = ()
    squares = ()
    for i in tl.static_range(len(cols)):
        apart = apart + (tl.where(cols[i] < C, x[i] - mean, 0.0),)
        squares = squares + (apart[i] * apart[i],)
    scale = tl.rsqrt(total(squares) / C + 1e-5)
    y = ()
    for i in tl.static_range(len(cols)):
        normed = apart[i] * scale * weight[i].to(tl.float32) + bias[i].to(tl.float32)
        y = y + (normed.to(x_ptr.dtype.element_ty).to(tl.float32),)
    return y


class Rows(NamedTuple):
    """How the rows of matrices of C columns are held, and shared among programs."""

    C: int
    total: int  # rows of all of them
    tuning: Tuning
    whole: bool = False  # each as one piece, however much of it is idle

    def pieces(self) -> tuple[int, int]:
        """Powers of two that together hold a row; the second may be 0."""
        whole = triton.next_power_of_2(self.C)
        rest = triton.next_power_of_2(self.C - whole // 2)
        split = not self.whole and self.tuning.pieces_from <= self.C and rest < whole // 2
        return (whole // 2, rest) if split else (whole, 0)

    def warps(self) -> int:
        """Of a program: usually 16 to 24 columns a thread."""
        return max(1, min(8, self.pieces()[0] // WARP_COLS))

    def programs(self, rows: int) -> int:
        """How many take so many of the rows."""
        tiles = int(triton.cdiv(rows, self.tuning.tile_rows))
        programs = self.tuning.programs * 4 // max(4, self.warps())
        return max(1, min(tiles, round(programs * rows / self.total)))

    def options(self, like: Tensor) -> dict[str, Any]:
        """For a vector like this one."""
        block, rest = self.pieces()
        sizes = {"C": self.C, "BLOCK": block, "ROWS": self.tuning.tile_rows, **({} if self.whole else {"REST": rest})}
        # Left to itself, ptxas stops at 80 registers in some of the kernels and spills. With more than 128, a
        # multiprocessor has no room for four programs of four warps, or two of eight.
        registers = {"maxnreg": 128 if like.element_size() < 4 else 255} if self.tuning.overlap else {}
        return {**sizes, "num_warps": self.warps(), **registers, **self.tuning.launch}

"""A row of C numbers in the registers of one program, as one piece or some of the same size.

A piece is a power of two, so that one piece of 4096 for a row of 2560 leaves three eighths of the threads idle; five of
512 use them all. Each value here is a tuple of pieces. Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import store
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

NORMED = 2
"""Tiles that a program asks for at a time where it holds the weights of a layer norm, too; an even number."""
WARP_COLS = 512
"""Columns of a row that a warp holds, as far as programs may be that large."""


@triton.jit
def columns(BLOCK: tl.constexpr, REST: tl.constexpr):
    """A piece of BLOCK columns, and as many more as the REST takes."""
    cols = (tl.arange(0, BLOCK),)
    for i in tl.static_range(REST // BLOCK):
        cols = cols + (BLOCK + i * BLOCK + tl.arange(0, BLOCK),)
    return cols


@triton.jit
def load_row(ptr, cols, C: tl.constexpr):
    """As it is stored, for `widened`, smaller numbers as whole words of 32 bits: what waits should be small."""
    PACK: tl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) if PACK > 1 else ptr
    row = ()
    for i in tl.static_range(len(cols)):
        word = (i * cols[0].shape[0]) // PACK + tl.arange(0, cols[i].shape[0] // PACK)
        row = row + (tl.load(words + word, mask=word < C // PACK, other=0),)
    return row


@triton.jit
def load_rows(ptr, rows, wanted, cols, C: tl.constexpr, KEEP: tl.constexpr):
    """Those of a matrix of C columns that are wanted, the others zero: they cost no traffic.

    Smaller numbers come as whole words of 32 bits, for `opened`. What a loop carries is kept number by number: were
    they apart, each turn would end by waiting for what it has asked for.
    """
    PACK: tl.constexpr = 32 // ptr.dtype.element_ty.primitive_bitwidth
    words = ptr.to(tl.pointer_type(tl.int32), bitcast=True) if PACK > 1 else ptr
    tile = ()
    for i in tl.static_range(len(cols)):
        word = (i * cols[0].shape[0]) // PACK + tl.arange(0, cols[i].shape[0] // PACK)
        at = words + rows[:, None] * (C // PACK) + word[None, :]
        tile = tile + (tl.load(at, mask=wanted[:, None] & (word < C // PACK)[None, :], other=0, eviction_policy=KEEP),)
    return tile


@triton.jit
def opened(words, ptr):
    """The numbers of a piece that `load_row` or `load_rows` has loaded from ptr: float32."""
    TYPE: tl.constexpr = ptr.dtype.element_ty
    if TYPE.primitive_bitwidth == 8:
        even = tl.join(words << 24, words << 8) >> 24
        odd = tl.join(words << 16, words) >> 24
    elif TYPE.is_bf16():
        even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    elif TYPE.primitive_bitwidth == 16:
        even = words.to(tl.int16).to(TYPE, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(TYPE, bitcast=True)
    if TYPE.primitive_bitwidth == 32:
        y = words
    elif len(words.shape) == 1:
        y = tl.join(even, odd).reshape(words.shape[0] * (32 // TYPE.primitive_bitwidth))
    else:
        y = tl.join(even, odd).reshape(words.shape[0], words.shape[1] * (32 // TYPE.primitive_bitwidth))
    return y.to(tl.float32)


@triton.jit
def store_row(ptr, row, cols, C: tl.constexpr):
    for i in tl.static_range(len(cols)):
        store(ptr + cols[i], row[i], cols[i] < C)


@triton.jit
def widened(row, ptr):
    """The numbers of a row that `load_row` has loaded from ptr."""
    wide = ()
    for i in tl.static_range(len(row)):
        wide = wide + (opened(row[i], ptr),)
    return wide


@triton.jit
def minus(a, b):
    left = ()
    for i in tl.static_range(len(a)):
        left = left + (a[i] - b[i],)
    return left


@triton.jit
def zeros_like(row):
    none = ()
    for i in tl.static_range(len(row)):
        none = none + (tl.zeros_like(row[i]),)
    return none


@triton.jit
def plus_product(x, a, b):
    """x + a b"""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i] + a[i] * b[i],)
    return y


@triton.jit
def times(w, ptr, x):
    """W x, for a few rows of W as `load_rows` has them from ptr, before threads meet: [ROWS, BLOCK], for `sums`."""
    y = opened(w[0], ptr) * x[0][None, :]
    for i in tl.static_range(1, len(x)):
        y += opened(w[i], ptr) * x[i][None, :]
    return tl.sum(y.reshape(y.shape[0], y.shape[1] // 4, 4), 2)


@triton.jit
def sums(parts):
    """Of each row of up to eight tiles [ROWS, BLOCK], one tile after another, for all of which threads meet once.

    [N * ROWS], N tiles being the next power of two, and zero those that there are not.
    """
    ROWS: tl.constexpr = parts[0].shape[0]
    for _ in tl.static_range(triton.next_power_of_2(len(parts)) - len(parts)):
        parts = parts + (tl.zeros_like(parts[0]),)
    COUNT: tl.constexpr = len(parts) * ROWS
    for _ in tl.static_range(3):
        if len(parts) > 1:
            joined = ()
            for i in tl.static_range(len(parts) // 2):  # the bits of a tile's number, from the highest on
                joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
            parts = joined
    y = tl.sum(parts[0], 1)
    return (y if ROWS == 1 else tl.trans(y.reshape(ROWS, COUNT // ROWS))).reshape(COUNT)


@triton.jit
def total(row):
    """Of its pieces: that takes no thread's waiting for another."""
    y = row[0]
    for i in tl.static_range(1, len(row)):
        y += row[i]
    return y


@triton.jit
def norm_of(x_ptr, weight, bias, cols, C: tl.constexpr):
    """Layer norm of the row at x_ptr, float32, rounded as the model keeps it: the state holds the same.

    Threads meet once, for the sums of what each number is apart from the first one, and of its square. What is lost by
    the difference of these is at most C times what float32 rounds away.
    """
    first = tl.load(x_ptr).to(tl.float32)
    x = widened(load_row(x_ptr, cols, C), x_ptr)
    apart = ()
    squares = ()
    for i in tl.static_range(len(cols)):
        apart = apart + (tl.where(cols[i] < C, x[i] - first, 0.0),)
        squares = squares + (apart[i] * apart[i],)
    mean, square = tl.split(tl.sum(tl.join(total(apart), total(squares)), 0) / C)
    scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + 1e-5)
    offset = mean * scale
    y = ()
    for i in tl.static_range(len(cols)):
        normed = (apart[i] * scale - offset) * weight[i] + bias[i]
        y = y + (normed.to(x_ptr.dtype.element_ty).to(tl.float32),)
    return y


class Rows(NamedTuple):
    """How the rows of matrices of C columns are held, and shared among programs."""

    C: int
    total: int  # rows of all of them
    tuning: Tuning

    def pieces(self) -> tuple[int, int]:
        """Columns of the first, a power of two, and of the others together: a row has one piece, or five or six."""
        whole = next_power_of_2(self.C)
        size = whole // 8
        return (size, (cdiv(self.C, size) - 1) * size) if self.split() else (whole, 0)

    def split(self) -> bool:
        """Whether in pieces: where one would leave a quarter of the threads idle, or more."""
        return self.tuning.pieces_from <= self.C <= next_power_of_2(self.C) * 3 // 4

    def tile_rows(self) -> int:
        """Of a tile."""
        return self.tuning.piece_rows if self.split() else self.tuning.tile_rows

    def warps(self) -> int:
        """Of a program: usually 16 to 24 columns a thread."""
        return max(1, min(8, (next_power_of_2(self.C) >> self.split()) // WARP_COLS))

    def programs(self, rows: int) -> int:
        """How many take so many of the rows."""
        tiles = cdiv(rows, self.tile_rows())
        return max(1, min(tiles, round(self.room() * rows / self.total)))

    def room(self) -> int:
        """How many programs run at once."""
        return self.tuning.programs * 4 // max(4, self.warps())

    def ahead(self) -> int:
        """Tiles that a program which holds nothing else but a vector has registers for."""
        return max(1, (self.tuning.ahead - 2 * self.split()) * self.tuning.tile_rows // self.tile_rows())

    def ahead_normed(self) -> int:
        """The same where it holds what a layer norm needs as well."""
        return max(NORMED, NORMED * self.tuning.tile_rows // self.tile_rows())

    def lean_registers(self, ahead: int) -> int:
        """Of a thread, for so many tiles of 16 bits, the vector and `spare` others."""
        cols = sum(self.pieces()) // (32 * self.warps())
        held = cols + ahead * self.tile_rows() * cols // 2
        return min(128, (held + self.tuning.spare + 7) // 8 * 8)

    def options(self, like: Tensor, ahead: int, *shares: tuple[int, int], lean: bool = False) -> dict[str, Any]:
        """For a vector like this one, where a program asks for so many tiles at a time; shares are rows and programs.

        Its turns are all of one length. A lean one holds nothing else but the vector, and leaves registers to others.
        """
        block, rest = self.pieces()
        most = max(cdiv(cdiv(rows, self.tile_rows()), programs) for rows, programs in shares)
        turns = cdiv(most, ahead)
        tiles = {"ROWS": self.tile_rows(), "AHEAD": cdiv(most, turns), "MORE": turns > 1}
        # Left to itself, ptxas stops at 80 registers in some of the kernels and spills. With more than 128, a
        # multiprocessor has no room for four programs of four warps, or two of eight.
        limit = self.lean_registers(tiles["AHEAD"]) if lean else 128
        registers = {"maxnreg": limit if like.element_size() < 4 else 255} if self.tuning.overlap else {}
        sizes: dict[str, Any] = {"C": self.C, "BLOCK": block, "REST": rest, "num_warps": self.warps()}
        sizes["KEEP"] = "evict_first" if like.shape[-2] == 1 else ""
        sizes["TOGETHER"] = self.tuning.together
        return {**sizes, **tiles, **registers, **self.tuning.launch}

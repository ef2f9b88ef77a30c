"""Matrix products of some rows, more than two: weights are the left operand of the tensor cores, rows the right one.

A program takes 64 rows of a matrix, or a part of their columns where there are few such; then the next kernel adds the
parts up. Its first weights are brought into the cache before the kernel ahead of it has ended, the others are asked
for some tiles ahead.
Sums are float32; weights of 8 bits are read as they are. Annotations are real types, not strings: Triton reads them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, store, wait_for_earlier
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

ROWS = 64
"""Of a matrix in one program: what the tensor cores multiply at a time."""
PROGRAMS = 132
"""About how many a product should have: one for each multiprocessor."""
SHARED = 96 * 1024
"""Bytes of shared memory that a program may have: every GPU since Ampere has as many."""


LINE = tl.constexpr(128)
"""Bytes that a cache brings in at a time."""


@triton.jit
def to_cache(w_ptr, tile, start, D, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Asks for COLS columns, from `start` on, of the ROWS rows of a tile; nothing waits for them.

    The interpreter knows no instructions: only where kernels overlap.
    """
    EACH: tl.constexpr = LINE * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(tile * ROWS + tl.arange(0, ROWS), D - 1)
    cols = tl.minimum(start + tl.arange(0, COLS // EACH) * EACH, C - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l", [w_ptr + rows[:, None] * C + cols[None, :]], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def multiplied(w, x, total):
    """total + w x^T: whichever is narrower is widened first."""
    if w.dtype == tl.float32:
        x = x.to(w.dtype)
    elif w.dtype != x.dtype:
        w = w.to(tl.float32).to(x.dtype)
    return tl.dot(w, tl.trans(x), total, input_precision="ieee")


@triton.jit
def product_tile(x_ptr, w_ptr, scale_ptr, out_ptr, tile, part, B, D, C: tl.constexpr, PER: tl.constexpr,
                 ROWS: tl.constexpr, BATCH: tl.constexpr, COLS: tl.constexpr, CACHED: tl.constexpr,
                 STAGES: tl.constexpr, THEN: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """out[b, d] = THEN(W[d] x[b]) for ROWS of d, of the PER columns of this part."""
    EVEN: tl.constexpr = C % COLS == 0
    if OVERLAP:
        to_cache(w_ptr, tile, part * PER, D, C, ROWS, CACHED)
    rows, b, k = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BATCH), tl.arange(0, COLS)
    live, used = (rows < D)[:, None], (b < B)[:, None]
    w_at = w_ptr + rows[:, None] * C + k[None, :]
    x_at = x_ptr + b[:, None] * C + k[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=rows < D, other=0.0)
    wait_for_earlier(OVERLAP)
    total = tl.zeros((ROWS, BATCH), tl.float32)
    for start in tl.range(part * PER, tl.minimum(part * PER + PER, C), COLS, num_stages=STAGES):
        if OVERLAP and scale_ptr is not None:  # Triton asks for no weights ahead that are converted first
            to_cache(w_ptr, tile, start + COLS, D, C, ROWS, COLS)
        inside = (start + k < C)[None, :]
        w = tl.load(w_at + start, mask=live if EVEN else live & inside, other=0.0)
        x = tl.load(x_at + start, mask=used if EVEN else used & inside, other=0.0)
        total = multiplied(w, x, total)
    if scale_ptr is not None:
        total *= scale[:, None]
    if THEN == "square":
        total = tl.maximum(total, 0.0)
        total *= total
    store(out_ptr + b[None, :] * D + rows[:, None], total, live & (b < B)[None, :])


@triton.jit(do_not_specialize=["B"])
def product_kernel(x_ptr, w_ptr, scale_ptr, out_ptr, other_x_ptr, other_w_ptr, other_scale_ptr, other_out_ptr, B, D, E,
                   FIRST, C: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
                   COLS: tl.constexpr, CACHED: tl.constexpr, STAGES: tl.constexpr, THEN: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    """Some matrices of D rows, each with an x of its own, by the FIRST programs; one of E rows by the others."""
    let_next_begin(OVERLAP)
    p, part = tl.program_id(0), tl.program_id(1)
    if p < FIRST:
        tiles = tl.cdiv(D, ROWS)
        i = p // tiles
        if scale_ptr is not None:
            scale_ptr += i * D
        product_tile(x_ptr + i * B * C, w_ptr + i.to(tl.int64) * D * C, scale_ptr, out_ptr + (part + i) * B * D,
                     p % tiles, part, B, D, C, PER, ROWS, BATCH, COLS, CACHED, STAGES, THEN, OVERLAP)  # fmt: skip
    elif other_x_ptr is not None:
        product_tile(other_x_ptr, other_w_ptr, other_scale_ptr, other_out_ptr, p - FIRST, part, B, E, C, PER, ROWS,
                     BATCH, COLS, CACHED, STAGES, "", OVERLAP)  # fmt: skip


def parts(x: Tensor, matrix: Matrix, tuning: Tuning) -> Tensor:
    """x [B, C], matrix [D, C] -> float32 [n, B, D], whose sum over the n parts is x W^T."""
    (B, C), D, cols = x.shape, matrix.weight.shape[0], _columns(x, matrix, tuning)
    tiles, turns = cdiv(D, ROWS), cdiv(C, cols)
    per = cdiv(turns, max(1, min(turns, PROGRAMS // tiles))) * cols  # columns of a part
    out = x.new_empty(cdiv(C, per), B, D, dtype=torch.float32)
    product_kernel[tiles, len(out)](
        x, *matrix, out, None, None, None, None, B, D, 0, tiles, C, per, **_options(B, per, cols, "", tuning)
    )
    return out


def pair(
    x: Tensor, matrices: Matrix, then: str, other_x: Tensor, other: Matrix, out_dtype: torch.dtype, tuning: Tuning
) -> tuple[Tensor, Tensor]:
    """x [n, B, C], matrices [n, D, C] -> [n, B, D], squared where positive, else zero, if `then` is "square".

    And other_x [B, C], other [E, C] -> [B, E] of out_dtype.
    """
    (n, B, C), D, E = x.shape, matrices.weight.shape[-2], other.weight.shape[0]
    out, other_out = x.new_empty(n, B, D), x.new_empty(B, E, dtype=out_dtype)
    tiles = cdiv(D, ROWS) * n
    options = _options(B, C, _columns(x, matrices, tuning), then, tuning)
    product_kernel[tiles + cdiv(E, ROWS), 1](
        x, *matrices, out, other_x, *other, other_out, B, D, E, tiles, C, C, **options
    )
    return out, other_out


def _columns(x: Tensor, matrix: Matrix, tuning: Tuning) -> int:
    """That a program takes at a time: of few rows, twice as many in 8 bits, which it waits for each time."""
    return tuning.skinny_cols * (1 if matrix.scale is None or x.shape[-2] > 16 else 2)


def _options(B: int, per: int, cols: int, then: str, tuning: Tuning) -> dict[str, Any]:
    """For B rows and `per` columns of a part. The tensor cores take at least 16 rows of the batch."""
    batch = max(16, next_power_of_2(B))
    cached = max(LINE.value, min(tuning.skinny_cached, next_power_of_2(per + 1) // 2))
    stages = min(tuning.skinny_stages, SHARED // (2 * cols * (ROWS + batch)))
    sizes = {"ROWS": ROWS, "BATCH": batch, "COLS": cols, "CACHED": cached, "STAGES": stages}
    return {**sizes, "THEN": then, "num_warps": 4, **tuning.launch}

"""Matrix times vector, for the few rows of a decode step: a program holds whole rows of the matrix and the vector.

A row of the batch is an axis of the grid; the weights come from memory once and from the cache for the others.
The vector is made where it is used: layer norm, token shift and interpolation are done again by each program, which
costs less than one more kernel. A program asks for its first weights before it does so, and before the kernel ahead of
it has ended. Sums are float32; weights of 8 bits are read as they are.
Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, share, store, tanh, wait_for_earlier
from rwkv_backends.kernels.rows import (
    Rows,
    columns,
    load_row,
    load_rows,
    minus,
    norm_of,
    plus_product,
    store_row,
    sums,
    times,
    widened,
)
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning


@triton.jit
def first_tiles(w_ptr, begin, stop, D, cols, C: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
                KEEP: tl.constexpr):  # fmt: skip
    """The first AHEAD tiles of those from `begin` to `stop` of a matrix of D rows."""
    end = tl.minimum(stop * ROWS, D)
    tiles = ()
    for i in tl.static_range(AHEAD):
        rows = (begin + i) * ROWS + tl.arange(0, ROWS)
        tiles = tiles + (load_rows(w_ptr, rows, rows < end, cols, C, KEEP),)
    return tiles


@triton.jit
def finish(parts, scale_ptr, scale_at, out_ptr, first, end, THEN: tl.constexpr):
    """out[d] = THEN(sum of row d), for the rows of some tiles' products, `first` and those after it as far as `end`.

    scale_ptr is None where the matrix is dense; otherwise row d is to be multiplied by what is at scale_at + d. What is
    multiplied or added is asked for first, or it would be one more thing to wait for.
    """
    rows = first + tl.arange(0, triton.next_power_of_2(len(parts)) * parts[0].shape[0])
    mask = rows < tl.minimum(end, first + len(parts) * parts[0].shape[0])
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + scale_at + rows, mask=mask, other=0.0)
    if THEN == "add":
        before = tl.load(out_ptr + rows, mask=mask, other=0.0)
    y = sums(parts)
    if scale_ptr is not None:
        y *= scale
    if THEN == "sigmoid":
        y = tl.sigmoid(y)
    if THEN == "add":
        y += before.to(tl.float32)
    store(out_ptr + rows, y, mask)


@triton.jit
def products(x, tiles, w_ptr, scale_ptr, scale_at, out_ptr, begin, stop, D, cols, C: tl.constexpr,
             ROWS: tl.constexpr, MORE: tl.constexpr, THEN: tl.constexpr, TOGETHER: tl.constexpr,
             KEEP: tl.constexpr):  # fmt: skip
    """out[d] = THEN(W[d] x) for the tiles from `begin` to `stop`, of which `tiles` are the first and without MORE all.

    A tile's registers go to the one that is as many further on. To pass tiles on from name to name instead would move
    registers, and a register can only be moved once its load is done. The sums of TOGETHER tiles are one meeting of
    threads.
    """
    end = tl.minimum(stop * ROWS, D)
    first = begin * ROWS
    if MORE:
        for _ in range(begin, stop, len(tiles)):
            later = ()
            parts = ()
            for j in tl.static_range(len(tiles)):
                parts = parts + (times(tiles[j], w_ptr, x),)
                rows = first + (len(tiles) + j) * ROWS + tl.arange(0, ROWS)
                later = later + (load_rows(w_ptr, rows, rows < end, cols, C, KEEP),)
                if len(parts) == TOGETHER or j + 1 == len(tiles):
                    finish(parts, scale_ptr, scale_at, out_ptr, first + (j + 1 - len(parts)) * ROWS, end, THEN)
                    parts = ()
                else:
                    tl.debug_barrier()  # or ptxas would mingle tiles and wait for the last before asking for the next
            first += len(tiles) * ROWS
            tiles = later
    else:
        parts = ()
        for j in tl.static_range(len(tiles)):
            parts = parts + (times(tiles[j], w_ptr, x),)
            if len(parts) == TOGETHER or j + 1 == len(tiles):
                finish(parts, scale_ptr, scale_at, out_ptr, first + (j + 1 - len(parts)) * ROWS, end, THEN)
                parts = ()


@triton.jit
def shift_lora_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptr, w_ptr, normed_ptr, dx_ptr, out_ptr,
                      D, C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
                      AHEAD: tl.constexpr, MORE: tl.constexpr, TOGETHER: tl.constexpr, KEEP: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    begin, stop = share(tl.program_id(0), tl.num_programs(0), tl.cdiv(D, ROWS))
    cols = columns(BLOCK, REST)
    tiles = first_tiles(w_ptr, begin, stop, D, cols, C, ROWS, AHEAD, KEEP)
    weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
    maa, prev = load_row(maa_ptr, cols, C), load_row(prev_ptr + b * C, cols, C)
    wait_for_earlier(OVERLAP)
    x = norm_of(x_ptr + b * C, widened(weight, weight_ptr), widened(bias, bias_ptr), cols, C)
    dx = minus(widened(prev, prev_ptr), x)
    if tl.program_id(0) == 0:
        store_row(normed_ptr + b * C, x, cols, C)
        store_row(dx_ptr + b * C, dx, cols, C)
    x = plus_product(x, dx, widened(maa, maa_ptr))
    products(x, tiles, w_ptr, None, 0, out_ptr + b * D, begin, stop, D, cols, C, ROWS, MORE, "", TOGETHER, KEEP)


@triton.jit
def lerp_kernel(lora_ptr, normed_ptr, dx_ptr, w_ptr, out_ptr, prev_ptr, B, R: tl.constexpr, C: tl.constexpr,
                RANK: tl.constexpr, COLS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    i, b = tl.program_id(1), tl.program_id(2)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = cols < C
    rank = tl.arange(0, RANK)
    w_ptr += i * (R + 1) * C
    w_mask = (rank < R)[:, None] & mask[None, :]
    w = tl.load(w_ptr + rank[:, None] * C + cols[None, :], mask=w_mask, other=0.0).to(tl.float32)
    maa = load_vector(w_ptr + R * C, cols, mask)
    wait_for_earlier(OVERLAP)
    # Volatile, so that ptxas does not put them off until the sum is known, for another wait.
    x = tl.load(normed_ptr + b * C + cols, mask=mask, other=0.0, volatile=True).to(tl.float32)
    dx = tl.load(dx_ptr + b * C + cols, mask=mask, other=0.0, volatile=True).to(tl.float32)
    low = tanh(load_vector(lora_ptr + (b * 5 + i) * R, rank, rank < R))
    store(out_ptr + (i * B + b) * C + cols, x + dx * (tl.sum(low[:, None] * w, 0) + maa), mask)
    if i == 0:
        store(prev_ptr + b * C + cols, x, mask)


@triton.jit
def kvrg_kernel(mixed_ptr, kvrg_ptr, scale_ptr, low_ptr, kvrg_out, low_out, B, D, PER, C: tl.constexpr,
                BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr,
                TOGETHER: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    part = tl.program_id(0) // PER  # of k, v, r, g, then the decay's adapter
    cols = columns(BLOCK, REST)
    if part < 4:
        w_ptr = kvrg_ptr + part * C * C
        begin, stop = share(tl.program_id(0) - part * PER, PER, tl.cdiv(C, ROWS))
        tiles = first_tiles(w_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
        wait_for_earlier(OVERLAP)
        x = widened(load_row(mixed_ptr + ((part + 1) * B + b) * C, cols, C), mixed_ptr)
        out_ptr = kvrg_out + (part * B + b) * C
        products(x, tiles, w_ptr, scale_ptr, part * C, out_ptr, begin, stop, C, cols, C, ROWS, MORE, "", TOGETHER, KEEP)
    else:
        begin, stop = share(tl.program_id(0) - 4 * PER, tl.num_programs(0) - 4 * PER, tl.cdiv(D, ROWS))
        low = first_tiles(low_ptr, begin, stop, D, cols, C, ROWS, AHEAD, KEEP)
        wait_for_earlier(OVERLAP)
        x = widened(load_row(mixed_ptr + b * C, cols, C), mixed_ptr)
        products(x, low, low_ptr, None, 0, low_out + b * D, begin, stop, D, cols, C, ROWS, MORE, "", TOGETHER, KEEP)


@triton.jit
def add_kernel(y_ptr, w_ptr, scale_ptr, x_ptr, C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
               ROWS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr, TOGETHER: tl.constexpr,
               KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    begin, stop = share(tl.program_id(0), tl.num_programs(0), tl.cdiv(C, ROWS))
    cols = columns(BLOCK, REST)
    tiles = first_tiles(w_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
    wait_for_earlier(OVERLAP)
    y = widened(load_row(y_ptr + b * C, cols, C), y_ptr)
    products(y, tiles, w_ptr, scale_ptr, 0, x_ptr + b * C, begin, stop, C, cols, C, ROWS, MORE, "add", TOGETHER, KEEP)


@triton.jit
def head_kernel(x_ptr, weight_ptr, bias_ptr, w_ptr, scale_ptr, out_ptr, V, C: tl.constexpr, BLOCK: tl.constexpr,
                REST: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr,
                TOGETHER: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    begin, stop = share(tl.program_id(0), tl.num_programs(0), tl.cdiv(V, ROWS))
    cols = columns(BLOCK, REST)
    tiles = first_tiles(w_ptr, begin, stop, V, cols, C, ROWS, AHEAD, KEEP)
    weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
    wait_for_earlier(OVERLAP)
    x = norm_of(x_ptr + b * C, widened(weight, weight_ptr), widened(bias, bias_ptr), cols, C)
    out_at = out_ptr + b.to(tl.int64) * V
    products(x, tiles, w_ptr, scale_ptr, 0, out_at, begin, stop, V, cols, C, ROWS, MORE, "", TOGETHER, KEEP)


def shift_lora(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], maa: Tensor, w: Tensor, tuning: Tuning
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C], prev [B, C], w [D, C] -> LN(x) [B, C], prev - LN(x) [B, C], W (LN(x) + dx maa) [B, D] float32."""
    (B, C), D = x.shape, w.shape[0]
    normed, dx, out = torch.empty_like(x), torch.empty_like(x), x.new_empty(B, D, dtype=torch.float32)
    rows = Rows(C, D, tuning)
    programs = rows.programs(D)
    options = rows.options(x, rows.ahead_normed(), (D, programs))
    options["num_warps"] = min(8, 2 * options["num_warps"])  # the norm is what takes time, not a tile or two
    shift_lora_kernel[programs, B](x, prev, *norm, maa, w, normed, dx, out, D, **options)
    return normed, dx, out


def lerps(lora: Tensor, normed: Tensor, dx: Tensor, w: Tensor, prev: Tensor, tuning: Tuning) -> Tensor:
    """`mixing.lerps` for one token of each row: lora [B, 5R], w [5, R + 1, C], its last row maa -> [5, B, C]."""
    (B, C), R = normed.shape, w.shape[1] - 1
    out = normed.new_empty(5, B, C)
    rank, cols = next_power_of_2(R), min(32, next_power_of_2(C))
    grid = (cdiv(C, cols), 5, B)
    lerp_kernel[grid](lora, normed, dx, w, out, prev, B, R, C, rank, cols, num_warps=1, **tuning.launch)
    return out


def kvrg(mixed: Tensor, w: Matrix, low: Tensor, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """mixed [5, B, C] (w, k, v, r, g), w [4, C, C], low [D, C] -> float32 k, v, r, g [4, B, C], the decay's [B, D]."""
    (_, B, C), D = mixed.shape, low.shape[0]
    out, low_out = mixed.new_empty(4, B, C, dtype=torch.float32), mixed.new_empty(B, D, dtype=torch.float32)
    rows = Rows(C, 4 * C + D, tuning)
    per = rows.programs(C)
    others = max(1, min(cdiv(D, rows.tile_rows()), rows.room() - 4 * per))  # all run at once
    options = rows.options(mixed, rows.ahead(), (C, per), (D, others), lean=True)
    kvrg_kernel[4 * per + others, B](mixed, *w, low, out, low_out, B, D, per, **options)
    return out, low_out


def add_product(y: Tensor, w: Matrix, x: Tensor, tuning: Tuning) -> None:
    """x += W y, for y, x [B, C] and w [C, C]."""
    B, C = x.shape
    rows = Rows(C, C, tuning)
    programs = rows.programs(C)
    options = rows.options(x, rows.ahead(), (C, programs), lean=True)
    add_kernel[programs, B](y, *w, x, **options)


def head(x: Tensor, norm: tuple[Tensor, Tensor], w: Matrix, tuning: Tuning) -> Tensor:
    """x [B, C], w [V, C] -> W LN(x), float32 [B, V]."""
    (B, C), V = x.shape, w.weight.shape[0]
    out = x.new_empty(B, V, dtype=torch.float32)
    rows = Rows(C, V, tuning)
    programs = rows.programs(V)
    head_kernel[programs, B](x, *norm, *w, out, V, **rows.options(x, rows.ahead_normed(), (V, programs)))
    return out

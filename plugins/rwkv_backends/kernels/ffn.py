"""Channel mixing of the few rows of a decode step: both of its large matrices in one kernel, and a small one after it.

A program that holds row f of the key matrix knows the input f of the value matrix, so it goes on to row f of that one,
turned round, and skips it where the input is zero: its load is under way while the next rows of the key matrix are
multiplied. Each program has a sum of its own of all C outputs; adding these up is the second kernel, since it takes
many multiprocessors and here only those that come last would know that all sums are there.
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

from rwkv_backends.kernels.device import let_next_begin, share, store, wait_for_earlier
from rwkv_backends.kernels.rows import (
    Rows,
    columns,
    load_row,
    load_rows,
    minus,
    norm_of,
    opened,
    plus_product,
    store_row,
    times,
    zeros_like,
)
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import first_tiles, products

PART_COLS = 16
"""Outputs of which one program adds up what all have."""


@triton.jit
def keys(x, w, w_ptr, scale_ptr, rows, end):
    """relu(W x)^2 of a tile's rows, zero from row `end` on."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=rows < end, other=0.0)
    y = times(w, w_ptr, x)
    if scale_ptr is not None:
        y *= scale
    y = tl.maximum(y, 0.0)
    return y * y


@triton.jit
def plus_values(total, v, v_ptr, k):
    """total + V^T k, for a few rows of V as `load_rows` has them from v_ptr."""
    y = ()
    for i in tl.static_range(len(v)):
        y = y + (total[i] + tl.sum(opened(v[i], v_ptr) * k[:, None], 0),)
    return y


@triton.jit
def key_value_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_k_ptr, maa_r_ptr, key_ptr, key_scale_ptr,
                     receptance_ptr, receptance_scale_ptr, value_ptr, normed_ptr, parts_ptr, r_ptr, F, KEYS,
                     C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
                     AHEAD: tl.constexpr, MORE: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """AHEAD tiles of keys are asked for at a time, an even number; MORE is of the receptance."""
    let_next_begin(OVERLAP)
    p, b = tl.program_id(0), tl.program_id(1)
    cols = columns(BLOCK, REST)
    if p < KEYS:
        begin, stop = share(p, KEYS, tl.cdiv(F, ROWS))
        end = tl.minimum(stop * ROWS, F)
        rows = begin * ROWS + tl.arange(0, ROWS)
        tiles = first_tiles(key_ptr, begin, stop, F, cols, C, ROWS, AHEAD, KEEP)
        if OVERLAP:  # unconditionally: there is nothing else to do yet
            v = load_rows(value_ptr, rows, rows < end, cols, C, KEEP)
        weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
        maa, prev = load_row(maa_k_ptr, cols, C), load_row(prev_ptr + b * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = norm_of(x_ptr + b * C, weight, bias, cols, C)
        if p == 0:
            store_row(normed_ptr + b * C, x, cols, C)
        x = plus_product(x, minus(prev, x), maa)
        k = keys(x, tiles[0], key_ptr, key_scale_ptr, rows, end)
        tiles = tiles[1:] + (load_rows(key_ptr, rows + AHEAD * ROWS, rows + AHEAD * ROWS < end, cols, C, KEEP),)
        if not OVERLAP:
            v = load_rows(value_ptr, rows, k != 0.0, cols, C, KEEP)
        total = zeros_like(x)
        for _ in range(begin + 1, stop, AHEAD):  # as in `products`; two tiles of values take turns
            later = ()
            for j in tl.static_range(AHEAD):
                rows += ROWS
                k_next = keys(x, tiles[j], key_ptr, key_scale_ptr, rows, end)
                later = later + (load_rows(key_ptr, rows + AHEAD * ROWS, rows + AHEAD * ROWS < end, cols, C, KEEP),)
                v_next = load_rows(value_ptr, rows, k_next != 0.0, cols, C, KEEP)
                total = plus_values(total, v, value_ptr, k)
                v = v_next
                k = k_next
            tiles = later
        total = plus_values(total, v, value_ptr, k)
        store_row(parts_ptr + (p * tl.num_programs(1) + b) * C, total, cols, C)
    elif receptance_ptr is not None:
        begin, stop = share(p - KEYS, tl.num_programs(0) - KEYS, tl.cdiv(C, ROWS))
        others = first_tiles(receptance_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
        weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
        maa, prev = load_row(maa_r_ptr, cols, C), load_row(prev_ptr + b * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = norm_of(x_ptr + b * C, weight, bias, cols, C)
        x = plus_product(x, minus(prev, x), maa)
        r_at = r_ptr + b * C
        products(x, others, receptance_ptr, receptance_scale_ptr, 0, r_at, begin, stop, C, cols, C, ROWS,
                 MORE, "sigmoid", KEEP)  # fmt: skip


@triton.jit
def parts_kernel(parts_ptr, r_ptr, scale_ptr, normed_ptr, x_ptr, prev_ptr, scale, PARTS, C: tl.constexpr,
                 WIDE: tl.constexpr, COLS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b, B = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = cols < C
    at = b * C + cols
    parts = tl.arange(0, WIDE)
    wait_for_earlier(OVERLAP)
    # Volatile, so that ptxas does not put them off until the sum is known, for another wait.
    x = tl.load(x_ptr + at, mask=mask, other=0.0, volatile=True).to(tl.float32)
    normed = tl.load(normed_ptr + at, mask=mask, other=0.0, volatile=True)
    if r_ptr is not None:
        r = tl.load(r_ptr + at, mask=mask, other=0.0, volatile=True)
    parts_at = parts_ptr + (parts[:, None] * B + b) * C + cols[None, :]
    y = tl.sum(tl.load(parts_at, mask=(parts < PARTS)[:, None] & mask[None, :], other=0.0), 0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + cols, mask=mask, other=0.0)
    if r_ptr is not None:
        y *= r
    store(x_ptr + at, (x + y) * scale, mask)
    store(prev_ptr + at, normed, mask)


def channel_mixing(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], maa: tuple[Tensor, Tensor | None], key: Matrix,
    receptance: Matrix | None, value: Matrix, scale: float, tuning: Tuning,
) -> None:  # fmt: skip
    """x = (x + r V^T k) scale and prev = LN(x), for x, prev [B, C]; k = relu(key)^2, r = sigmoid(receptance).

    Both are of LN(x) shifted by maa: key [F, C], receptance [C, C], without which r is 1. value V [F, C], turned round,
    has its scales of its columns.
    """
    (B, C), F = x.shape, key.weight.shape[0]
    held = Rows(C, F, tuning)
    ahead = held.ahead_normed()
    keys, others = _programs(held, receptance is not None)
    normed, full = torch.empty_like(x), torch.float32
    parts = x.new_empty(keys, B, C, dtype=full)
    r = None if receptance is None else x.new_empty(B, C, dtype=full)
    key_value_kernel[keys + others, B](
        x, prev, *norm, *maa, *key, *(receptance or (None, None)), value.weight, normed, parts, r, F, keys,
        **held.options(x, ahead, (C, max(1, others))) | {"AHEAD": ahead},
    )  # fmt: skip
    wide = triton.next_power_of_2(keys)
    parts_kernel[triton.cdiv(C, PART_COLS), B](
        parts, r, value.scale, normed, x, prev, scale, keys, C, wide, PART_COLS,
        num_warps=max(1, min(8, wide * PART_COLS // 1024)), maxnreg=64, **tuning.launch,
    )  # fmt: skip


def _programs(held: Rows, gated: bool) -> tuple[int, int]:
    """For the keys, all with the same number of tiles, and for the receptance. A quarter of the values is expected."""
    C, F, rows = held.C, held.total, held.tile_rows()
    held = held._replace(total=F + F // 4 + (C if gated else 0))
    tiles = triton.cdiv(F, rows)
    each = max(1, round(tiles / held.programs(F + F // 4)))
    keys = triton.cdiv(tiles, each)
    return keys, max(1, min(triton.cdiv(C, rows), held.room() - keys)) if gated else 0

"""Channel mixing of the few rows of a decode step: both of its large matrices in one kernel, and a small one after it.

A program that holds row f of the key matrix knows the input f of the value matrix, so it goes on to row f of that one,
turned round, and skips it where the input is zero: some rows of it are under way while the next ones of the key matrix
are multiplied. Each program has a sum of its own of all C outputs; adding these up is the second kernel, since it takes
many multiprocessors and here only those that come last would know that all sums are there.
Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import math

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
    sums,
    times,
    widened,
    zeros_like,
)
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import first_tiles, products

PART_COLS = 16
"""Outputs of which one program adds up what all have."""


@triton.jit
def keys(parts, scale_ptr, first, end):
    """relu(W x)^2 of the rows of some tiles, whose `times` parts are: a [ROWS] each, zero from row `end` on."""
    ROWS: tl.constexpr = parts[0].shape[0]
    if scale_ptr is not None:
        rows = first + tl.arange(0, len(parts) * ROWS)
        scale = tl.load(scale_ptr + rows, mask=rows < end, other=0.0)
    y = sums(parts)
    if scale_ptr is not None:
        y *= scale
    y = tl.maximum(y, 0.0)
    y *= y
    k = (y,)
    for _ in tl.static_range(3):
        if len(k) < len(parts):
            halves = ()
            for i in tl.static_range(len(k)):
                halves = halves + tl.split(tl.trans(k[i].reshape(2, k[i].shape[0] // 2)))
            k = halves
    return k


@triton.jit
def wanted_values(v_ptr, k, first, cols, C: tl.constexpr, KEEP: tl.constexpr):
    """Of V the rows from `first` on whose k is not zero, a tile for each of k."""
    ROWS: tl.constexpr = k[0].shape[0]
    v = ()
    for i in tl.static_range(len(k)):
        v = v + (load_rows(v_ptr, first + i * ROWS + tl.arange(0, ROWS), k[i] != 0.0, cols, C, KEEP),)
    return v


@triton.jit
def plus_values(total, tiles, v_ptr, k):
    """total + V^T k, for a few rows of V as `load_rows` has them from v_ptr."""
    for j in tl.static_range(len(tiles)):
        y = ()
        for i in tl.static_range(len(total)):
            y = y + (total[i] + tl.sum(opened(tiles[j][i], v_ptr) * k[j][:, None], 0),)
        total = y
    return total


@triton.jit
def key_value_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_k_ptr, maa_r_ptr, key_ptr, key_scale_ptr,
                     receptance_ptr, receptance_scale_ptr, value_ptr, normed_ptr, parts_ptr, r_ptr, F, KEYS,
                     C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
                     AHEAD: tl.constexpr, MORE: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr,
                     BEYOND: tl.constexpr, KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A GROUP of tiles of keys is one meeting, BEYOND which so many are asked for; AHEAD, MORE are the receptance's."""
    let_next_begin(OVERLAP)
    p, b = tl.program_id(0), tl.program_id(1)
    cols = columns(BLOCK, REST)
    if p < KEYS:
        begin, stop = share(p, KEYS, tl.cdiv(F, ROWS))
        end = tl.minimum(stop * ROWS, F)
        first = begin * ROWS
        tiles = first_tiles(key_ptr, begin, stop, F, cols, C, ROWS, GROUP + BEYOND, KEEP)
        weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
        maa, prev = load_row(maa_k_ptr, cols, C), load_row(prev_ptr + b * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = norm_of(x_ptr + b * C, widened(weight, weight_ptr), widened(bias, bias_ptr), cols, C)
        if p == 0:
            store_row(normed_ptr + b * C, x, cols, C)
        x = plus_product(x, minus(widened(prev, prev_ptr), x), widened(maa, maa_k_ptr))
        total = zeros_like(x)
        TURN: tl.constexpr = max(BEYOND, GROUP)
        opening = ()
        for j in tl.static_range(GROUP):
            opening = opening + (times(tiles[j], key_ptr, x),)
        tiles = tiles[GROUP:]
        k = keys(opening, key_scale_ptr, first, end)
        v = wanted_values(value_ptr, k, first, cols, C, KEEP)
        for _ in range(begin + GROUP, stop, TURN):  # as in `products`
            parts = ()
            for j in tl.static_range(TURN):
                parts = parts + (times(tiles[0], key_ptr, x),)
                rows = first + (GROUP + j + BEYOND) * ROWS + tl.arange(0, ROWS)
                tiles = tiles[1:] + (load_rows(key_ptr, rows, rows < end, cols, C, KEEP),)
                if len(parts) == GROUP:
                    at = first + (j + 1) * ROWS
                    k_next = keys(parts, key_scale_ptr, at, end)
                    if TURN > GROUP:  # registers of two groups take turns
                        v_next = wanted_values(value_ptr, k_next, at, cols, C, KEEP)
                        total = plus_values(total, v, value_ptr, k)
                        v = v_next
                    else:
                        total = plus_values(total, v, value_ptr, k)
                        v = wanted_values(value_ptr, k_next, at, cols, C, KEEP)
                    k = k_next
                    parts = ()
            first += TURN * ROWS
        total = plus_values(total, v, value_ptr, k)
        store_row(parts_ptr + (p * tl.num_programs(1) + b) * C, total, cols, C)
    elif receptance_ptr is not None:
        begin, stop = share(p - KEYS, tl.num_programs(0) - KEYS, tl.cdiv(C, ROWS))
        others = first_tiles(receptance_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
        weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
        maa, prev = load_row(maa_r_ptr, cols, C), load_row(prev_ptr + b * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = norm_of(x_ptr + b * C, widened(weight, weight_ptr), widened(bias, bias_ptr), cols, C)
        x = plus_product(x, minus(widened(prev, prev_ptr), x), widened(maa, maa_r_ptr))
        r_at = r_ptr + b * C
        products(x, others, receptance_ptr, receptance_scale_ptr, 0, r_at, begin, stop, C, cols, C, ROWS,
                 MORE, "sigmoid", TOGETHER, KEEP)  # fmt: skip


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
    group = max(1, tuning.key_rows // held.tile_rows())
    ahead = group + tuning.key_ahead  # with a layer norm beside them
    keys, others = _programs(held, group, receptance is not None)
    normed, full = torch.empty_like(x), torch.float32
    parts = x.new_empty(keys, B, C, dtype=full)
    r = None if receptance is None else x.new_empty(B, C, dtype=full)
    key_value_kernel[keys + others, B](
        x, prev, *norm, *maa, *key, *(receptance or (None, None)), value.weight, normed, parts, r, F, keys,
        **held.options(x, ahead, (C, max(1, others))) | {"GROUP": group, "BEYOND": tuning.key_ahead},
    )  # fmt: skip
    wide = next_power_of_2(keys)
    parts_kernel[cdiv(C, PART_COLS), B](
        parts, r, value.scale, normed, x, prev, scale, keys, C, wide, PART_COLS,
        num_warps=max(1, min(8, wide * PART_COLS // 1024)), maxnreg=64, **tuning.launch,
    )  # fmt: skip


def _programs(held: Rows, group: int, gated: bool) -> tuple[int, int]:
    """For the keys, each with so many groups of tiles, and for the receptance; half of the values are expected.

    Of the two numbers of groups next to an even share the one with which the longest share is shorter.
    """
    C, F, rows, room = held.C, held.total, held.tile_rows(), held.room()
    tiles = cdiv(F, rows)
    even = tiles * (1 + (C / (F * 1.5) if gated else 0)) / room / group

    def split(groups: int) -> tuple[int, int]:
        keys = cdiv(tiles, groups * group)
        return keys, max(1, min(cdiv(C, rows), room - keys)) if gated else 0

    def longest(groups: int) -> float:
        keys, others = split(groups)
        return max(groups * group * rows * 1.5, C / others if gated else 0) if keys + others <= room else math.inf

    fewest = max(1, int(even))
    return split(min(fewest, fewest + 1, key=longest))

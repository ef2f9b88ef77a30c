"""Channel mixing of the few rows of a decode step: both of its large matrices in one kernel, and a small one after it.

A program that holds row f of the key matrix knows the input f of the value matrix, so it goes on to row f of that one,
turned round, and skips it where the input is zero: its load is under way while the next rows of the key matrix are
multiplied. Each program has a sum of its own of all C outputs; adding these up is the second kernel, since it takes
many multiprocessors and here only those that come last would know that all sums are there.
Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import (
    let_next_begin,
    load_raw,
    norm_with,
    share,
    store,
    wait_for_earlier,
)
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import Rows, first_tiles, products, tile


@triton.jit
def keys(x, w, scale_ptr, rows, end):
    """relu(W x)^2 of a tile's rows, zero from row `end` on."""
    y = tl.sum(w.to(tl.float32) * x[None, :], 1)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + rows, mask=rows < end, other=0.0)
    y = tl.maximum(y, 0.0)
    return y * y


@triton.jit
def value_rows(w_ptr, rows, wanted, cols, mask, C: tl.constexpr):
    """A load that is masked out costs no traffic: rows of [F, C] that are not wanted are skipped."""
    return tl.load(w_ptr + rows[:, None] * C + cols[None, :], mask=wanted[:, None] & mask[None, :], other=0.0)


@triton.jit
def key_value_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_k_ptr, maa_r_ptr, key_ptr, key_scale_ptr,
                     receptance_ptr, receptance_scale_ptr, value_ptr, normed_ptr, parts_ptr, r_ptr, F, KEYS,
                     C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    p, b = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    if p < KEYS:
        begin, stop = share(p, KEYS, tl.cdiv(F, ROWS))
        end = tl.minimum(stop * ROWS, F)
        rows = begin * ROWS + tl.arange(0, ROWS)
        first, w = first_tiles(key_ptr, begin, stop, F, cols, mask, C, ROWS)
        if OVERLAP:  # unconditionally: there is nothing else to do yet
            v = value_rows(value_ptr, rows, rows < end, cols, mask, C)
        weight, bias = load_raw(weight_ptr, cols, mask), load_raw(bias_ptr, cols, mask)
        maa, prev = load_raw(maa_k_ptr, cols, mask), load_raw(prev_ptr + b * C, cols, mask)
        wait_for_earlier(OVERLAP)
        x = norm_with(x_ptr + b * C, weight, bias, cols, mask, C)
        if p == 0:
            store(normed_ptr + b * C + cols, x, mask)
        x += (prev.to(tl.float32) - x) * maa.to(tl.float32)
        ahead = tile(key_ptr, rows + 2 * ROWS, end, cols, mask, C)
        k = keys(x, first, key_scale_ptr, rows, end)
        if not OVERLAP:
            v = value_rows(value_ptr, rows, k != 0.0, cols, mask, C)
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(begin + 1, stop):
            rows += ROWS
            later = tile(key_ptr, rows + 2 * ROWS, end, cols, mask, C)
            k_next = keys(x, w, key_scale_ptr, rows, end)
            v_next = value_rows(value_ptr, rows, k_next != 0.0, cols, mask, C)
            total += tl.sum(v.to(tl.float32) * k[:, None], 0)
            w = ahead
            ahead = later
            v = v_next
            k = k_next
        total += tl.sum(v.to(tl.float32) * k[:, None], 0)
        tl.store(parts_ptr + (p * tl.num_programs(1) + b) * C + cols, total, mask=mask)
    elif receptance_ptr is not None:
        begin, stop = share(p - KEYS, tl.num_programs(0) - KEYS, tl.cdiv(C, ROWS))
        first, w = first_tiles(receptance_ptr, begin, stop, C, cols, mask, C, ROWS)
        weight, bias = load_raw(weight_ptr, cols, mask), load_raw(bias_ptr, cols, mask)
        maa, prev = load_raw(maa_r_ptr, cols, mask), load_raw(prev_ptr + b * C, cols, mask)
        wait_for_earlier(OVERLAP)
        x = norm_with(x_ptr + b * C, weight, bias, cols, mask, C)
        x += (prev.to(tl.float32) - x) * maa.to(tl.float32)
        r_at = r_ptr + b * C
        products(x, first, w, receptance_ptr, receptance_scale_ptr, 0, r_at, begin, stop, C, cols, mask, C, ROWS,
                 "sigmoid")  # fmt: skip


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
    """x = (x + r V^T k) scale and prev = LN(x), for x, prev [B, C]; k and r as `vector.key_receptance` has them.

    key [F, C]; value [F, C], turned round, its scales of its columns; without a receptance [C, C] r is 1.
    """
    (B, C), F = x.shape, key.weight.shape[0]
    keys, others = _programs(C, F, receptance is not None, tuning)
    normed, full = torch.empty_like(x), torch.float32
    parts = x.new_empty(keys, B, C, dtype=full)
    r = None if receptance is None else x.new_empty(B, C, dtype=full)
    registers = {"maxnreg": 128} if tuning.overlap and x.element_size() < 4 else {}  # as many programs as without it
    key_value_kernel[keys + others, B](
        x, prev, *norm, *maa, *key, *(receptance or (None, None)), value.weight, normed, parts, r, F, keys,
        **{**Rows(C, F, tuning).options, **registers},
    )  # fmt: skip
    cols, wide = min(tuning.part_cols, triton.next_power_of_2(C)), triton.next_power_of_2(keys)
    parts_kernel[triton.cdiv(C, cols), B](
        parts, r, value.scale, normed, x, prev, scale, keys, C, wide, cols,
        num_warps=max(1, min(8, wide * cols // 1024)), maxnreg=64, **tuning.launch,
    )  # fmt: skip


def _programs(C: int, F: int, gated: bool, tuning: Tuning) -> tuple[int, int]:
    """For the keys, all with the same number of tiles, and for the receptance. A quarter of the values is expected."""
    work = F + F // 4 + (C if gated else 0)
    rows = Rows(C, work, tuning)
    tiles = triton.cdiv(F, tuning.tile_rows)
    each = max(1, round(tiles / rows.programs(F + F // 4)))
    keys = triton.cdiv(tiles, each)
    return keys, max(1, min(triton.cdiv(C, tuning.tile_rows), rows.programs(work) - keys)) if gated else 0

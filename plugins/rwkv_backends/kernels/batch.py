"""What lies between the matrix products of a decode step of many rows: one token each, so that no row needs another.

B rows of C channels. What the next token is shifted from, `prev`, is written where it is read. Kernels read weights and
what earlier steps have left before they wait. Annotations are real types, not strings: Triton reads them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import (
    let_next_begin,
    load_vector,
    normed_row,
    sigmoid,
    store,
    tanh,
    wait_for_earlier,
)
from rwkv_backends.kernels.mixing import across
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

Norm = tuple[Tensor, Tensor]
ROWS, COLS = 64, 64
"""Of a program that makes a mixture; half as many rows in float32, which no tensor core multiplies."""


@triton.jit
def sum_of(ptr, STEP, at, mask, PARTS: tl.constexpr):
    """What PARTS arrays of STEP numbers each have there, added up: float32."""
    total = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        total += tl.load(ptr + i * STEP + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def begin_kernel(r_ptr, v_ptr, x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptr, dx_ptr, out_ptr, scale,
                 PARTS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * C
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    kept = x_ptr.dtype.element_ty
    weight, bias = load_vector(weight_ptr, cols, mask), load_vector(bias_ptr, cols, mask)
    if prev_ptr is not None:
        prev, maa = load_vector(prev_ptr + row, cols, mask), load_vector(maa_ptr, cols, mask)
    wait_for_earlier(OVERLAP)
    x = load_vector(x_ptr + row, cols, mask)
    if v_ptr is not None:
        v = sum_of(v_ptr + row, tl.num_programs(0) * C, cols, mask, PARTS)
        v *= sigmoid(load_vector(r_ptr + row, cols, mask))
        rounded = ((x + v) * scale).to(kept)
        tl.store(x_ptr + row + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    normed = normed_row(x, weight, bias, mask, C).to(kept).to(tl.float32)
    if prev_ptr is not None:
        dx = prev - normed
        store(prev_ptr + row + cols, normed, mask)
        store(dx_ptr + row + cols, dx, mask)
        normed += dx * maa
    store(out_ptr + row + cols, normed, mask)


@triton.jit
def shift_kernel(x_ptr, gain_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptrs, out_ptrs, PARTS: tl.constexpr,
                 C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * C
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    weight, bias = load_vector(weight_ptr, cols, mask), load_vector(bias_ptr, cols, mask)
    prev = load_vector(prev_ptr + row, cols, mask)
    wait_for_earlier(OVERLAP)
    kept = x_ptr.dtype.element_ty
    x = load_vector(x_ptr + row, cols, mask)
    if PARTS > 0:
        x = (x + sum_of(gain_ptr + row, tl.num_programs(0) * C, cols, mask, PARTS)).to(kept).to(tl.float32)
        store(x_ptr + row + cols, x, mask)
    normed = normed_row(x, weight, bias, mask, C).to(kept).to(tl.float32)
    dx = prev - normed
    for i in tl.static_range(len(maa_ptrs)):
        store(out_ptrs[i] + row + cols, normed + dx * load_vector(maa_ptrs[i], cols, mask), mask)
    store(prev_ptr + row + cols, normed, mask)


@triton.jit(do_not_specialize=["B"])
def mixtures_kernel(lora_ptr, normed_ptr, dx_ptr, w_ptr, out_ptr, B, PARTS: tl.constexpr, R: tl.constexpr,
                    C: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                    OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    start, i = tl.program_id(0) * ROWS, tl.program_id(2)
    row, rank = tl.arange(0, ROWS)[:, None], tl.arange(0, RANK)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = row < B - start
    mask = live & (cols < C)[None, :]
    w_ptr += i * (R + 1) * C
    w_at = w_ptr + rank[:, None] * C + cols[None, :]
    w = tl.load(w_at, mask=(rank < R)[:, None] & (cols < C)[None, :], other=0.0)
    maa = load_vector(w_ptr + R * C, cols, cols < C)
    wait_for_earlier(OVERLAP)
    lora_at = start * (5 * R) + i * R + row * (5 * R) + rank[None, :]
    lora = sum_of(lora_ptr, B * 5 * R, lora_at, live & (rank < R)[None, :], PARTS)
    at = start * C + row * C + cols[None, :]
    x = tl.load(normed_ptr + at, mask=mask, other=0.0)
    dx = tl.load(dx_ptr + at, mask=mask, other=0.0)
    mix = tl.dot(tanh(lora).to(w.dtype), w, input_precision="ieee") + maa[None, :]
    store(out_ptr + i * B * C + at, x.to(tl.float32) + dx.to(tl.float32) * mix, mask)


def begin(
    x: Tensor,
    gated: tuple[Tensor, Tensor] | None,
    scale: float,
    prev: Tensor,
    norm: Norm,
    maa: Tensor,
    tuning: Tuning,
) -> tuple[Tensor, Tensor]:
    """What the last layer leaves, x = (x + sigmoid(r) v) scale with (r, v) `gated`, and what the next one begins with.

    x, prev [B, C] -> dx (what prev is beyond LN(x)) and LN(x) + dx maa, both [B, C]; prev = LN(x). v is the sum of some
    parts [n, B, C].
    """
    B, C = x.shape
    r, v = gated or (None, None)
    dx, out = torch.empty_like(x), torch.empty_like(x)
    begin_kernel[B,](r, v, x, prev, *norm, maa, dx, out, scale, count(v), **across(C), **tuning.launch)
    return dx, out


def end(x: Tensor, gated: tuple[Tensor, Tensor] | None, scale: float, norm: Norm, tuning: Tuning) -> Tensor:
    """As `begin` after the last layer: LN(x) [B, C]."""
    B, C = x.shape
    r, v = gated or (None, None)
    out = torch.empty_like(x)
    begin_kernel[B,](r, v, x, None, *norm, None, None, out, scale, count(v), **across(C), **tuning.launch)
    return out


def shift(x: Tensor, gain: Tensor | None, prev: Tensor, norm: Norm, maa: Sequence[Tensor], tuning: Tuning) -> Tensor:
    """x, prev [B, C] -> LN(x) + dx maa for each of these n, [n, B, C]; prev = LN(x). Before that x gains the sum of
    some parts [m, B, C]."""
    B, C = x.shape
    out = x.new_empty(len(maa), B, C)
    shift_kernel[B,](x, gain, prev, *norm, tuple(maa), out.unbind(0), count(gain), **across(C), **tuning.launch)
    return out


def count(parts: Tensor | None) -> int:
    return 0 if parts is None else len(parts)


def mixtures(lora: Tensor, normed: Tensor, dx: Tensor, w: Tensor, tuning: Tuning) -> Tensor:
    """normed + dx (tanh(lora) W + maa): w [5, R + 1, C], its last row maa -> [5, B, C]; lora is a sum of [n, B, 5R]."""
    (B, C), R = normed.shape, w.shape[1] - 1
    out = normed.new_empty(5, B, C)
    rows = 16 if B <= 16 else ROWS * 2 // w.element_size()
    cols = min(COLS, max(16, next_power_of_2(C)))
    rank = max(16, next_power_of_2(R))
    grid = cdiv(B, rows), cdiv(C, cols), 5
    mixtures_kernel[grid](lora, normed, dx, w, out, B, len(lora), R, C, rank, rows, cols, num_warps=4, **tuning.launch)
    return out

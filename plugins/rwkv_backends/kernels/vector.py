"""Matrix times vector, for the few rows of a decode step: a program holds whole rows of the matrix and the vector.

A row of the batch is an axis of the grid; the weights come from memory once and from the cache for the others.
The vector is made where it is used: layer norm, token shift and interpolation are done again by each program, which
costs less than one more kernel. A program asks for its first weights before it does so. Sums are float32; weights of
8 bits are read as they are.
Annotations are real types, not strings: Triton reads them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import load_vector, norm_row, store
from rwkv_backends.kernels.tuning import Tuning


@triton.jit
def tile(w_ptr, rows, end, cols, mask, C: tl.constexpr):
    """Rows of a matrix of C columns, zero from row `end` on."""
    return tl.load(w_ptr + rows[:, None] * C + cols[None, :], mask=(rows < end)[:, None] & mask[None, :], other=0.0)


@triton.jit
def products(x, w, w_ptr, scale_ptr, scale_at, out_ptr, first, end, cols, mask, C: tl.constexpr, ROWS: tl.constexpr,
             STEPS: tl.constexpr, THEN: tl.constexpr):  # fmt: skip
    """out[first:end] = THEN(W[first:end] x), for the ROWS x STEPS rows of one program; w holds the first ROWS.

    scale_ptr is None where the matrix is dense; otherwise row d is to be multiplied by what is at scale_at + d.
    """
    for i in range(STEPS):
        rows = first + i * ROWS + tl.arange(0, ROWS)
        ahead = tile(w_ptr, rows + ROWS, end, cols, mask, C)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + scale_at + rows, mask=rows < end, other=0.0)
        if THEN == "relu squared":
            y = tl.maximum(y, 0.0)
            y = y * y
        if THEN == "sigmoid":
            y = tl.sigmoid(y)
        if THEN == "add":
            y += tl.load(out_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        store(out_ptr + rows, y, rows < end)
        w = ahead


@triton.jit
def shift_lora_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptr, w_ptr, normed_ptr, dx_ptr, out_ptr,
                      D, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    first = tl.program_id(0) * ROWS * STEPS
    end = tl.minimum(first + ROWS * STEPS, D)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    w = tile(w_ptr, first + tl.arange(0, ROWS), end, cols, mask, C)
    x = norm_row(x_ptr + b * C, weight_ptr, bias_ptr, cols, mask, C)
    dx = load_vector(prev_ptr + b * C, cols, mask) - x
    if tl.program_id(0) == 0:
        store(normed_ptr + b * C + cols, x, mask)
        store(dx_ptr + b * C + cols, dx, mask)
    maa = load_vector(maa_ptr, cols, mask)
    products(x + dx * maa, w, w_ptr, None, 0, out_ptr + b * D, first, end, cols, mask, C, ROWS, STEPS, "")


@triton.jit
def kvrg_kernel(mixed_ptr, kvrg_ptr, scale_ptr, low_ptr, kvrg_out, low_out, B, D, PER,
                C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    part = tl.program_id(0) // PER  # of k, v, r, g, then the decay's adapter
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    rows = tl.arange(0, ROWS)
    if part < 4:
        w_ptr = kvrg_ptr + part * C * C
        first = (tl.program_id(0) - part * PER) * ROWS * STEPS
        end = tl.minimum(first + ROWS * STEPS, C)
        w = tile(w_ptr, first + rows, end, cols, mask, C)
        x = load_vector(mixed_ptr + ((part + 1) * B + b) * C, cols, mask)
        out_ptr = kvrg_out + (part * B + b) * C
        products(x, w, w_ptr, scale_ptr, part * C, out_ptr, first, end, cols, mask, C, ROWS, STEPS, "")
    else:
        first = (tl.program_id(0) - 4 * PER) * ROWS * STEPS
        end = tl.minimum(first + ROWS * STEPS, D)
        low = tile(low_ptr, first + rows, end, cols, mask, C)
        x = load_vector(mixed_ptr + b * C, cols, mask)
        products(x, low, low_ptr, None, 0, low_out + b * D, first, end, cols, mask, C, ROWS, STEPS, "")


@triton.jit
def add_kernel(y_ptr, w_ptr, scale_ptr, x_ptr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
               STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    first = tl.program_id(0) * ROWS * STEPS
    end = tl.minimum(first + ROWS * STEPS, C)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    w = tile(w_ptr, first + tl.arange(0, ROWS), end, cols, mask, C)
    y = load_vector(y_ptr + b * C, cols, mask)
    products(y, w, w_ptr, scale_ptr, 0, x_ptr + b * C, first, end, cols, mask, C, ROWS, STEPS, "add")


@triton.jit
def key_receptance_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_k_ptr, maa_r_ptr, key_ptr, key_scale_ptr,
                          receptance_ptr, receptance_scale_ptr, normed_ptr, k_ptr, r_ptr, F, KEYS, C: tl.constexpr,
                          BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    rows = tl.arange(0, ROWS)
    if tl.program_id(0) < KEYS:
        first = tl.program_id(0) * ROWS * STEPS
        end = tl.minimum(first + ROWS * STEPS, F)
        w = tile(key_ptr, first + rows, end, cols, mask, C)
        x = norm_row(x_ptr + b * C, weight_ptr, bias_ptr, cols, mask, C)
        if tl.program_id(0) == 0:
            store(normed_ptr + b * C + cols, x, mask)
        x += (load_vector(prev_ptr + b * C, cols, mask) - x) * load_vector(maa_k_ptr, cols, mask)
        k_at = k_ptr + b * F
        products(x, w, key_ptr, key_scale_ptr, 0, k_at, first, end, cols, mask, C, ROWS, STEPS, "relu squared")
    elif receptance_ptr is not None:
        first = (tl.program_id(0) - KEYS) * ROWS * STEPS
        end = tl.minimum(first + ROWS * STEPS, C)
        w = tile(receptance_ptr, first + rows, end, cols, mask, C)
        x = norm_row(x_ptr + b * C, weight_ptr, bias_ptr, cols, mask, C)
        x += (load_vector(prev_ptr + b * C, cols, mask) - x) * load_vector(maa_r_ptr, cols, mask)
        r_at = r_ptr + b * C
        products(x, w, receptance_ptr, receptance_scale_ptr, 0, r_at, first, end, cols, mask, C, ROWS, STEPS, "sigmoid")


@triton.jit
def value_kernel(k_ptr, r_ptr, w_ptr, scale_ptr, normed_ptr, x_ptr, prev_ptr, scale,
                 C: tl.constexpr, F: tl.constexpr, TALL: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A load that is masked out costs no traffic: rows of [F, C] whose input is zero are skipped, losslessly."""
    b = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mask = cols < C
    total = tl.zeros((TALL, COLS), tl.float32)
    rows = tl.arange(0, TALL)
    k = load_vector(k_ptr + b * F, rows, rows < F)
    for _ in range(0, F, TALL):
        w = tl.load(w_ptr + rows[:, None] * C + cols[None, :], mask=(k != 0.0)[:, None] & mask[None, :], other=0.0)
        rows += TALL
        ahead = load_vector(k_ptr + b * F, rows, rows < F)
        total += w.to(tl.float32) * k[:, None]
        k = ahead
    at = b * C + cols
    y = tl.sum(total, 0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + cols, mask=mask, other=0.0)
    if r_ptr is not None:
        y *= tl.load(r_ptr + at, mask=mask, other=0.0)
    store(x_ptr + at, (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + y) * scale, mask)
    store(prev_ptr + at, tl.load(normed_ptr + at, mask=mask, other=0.0), mask)


@triton.jit
def head_kernel(x_ptr, weight_ptr, bias_ptr, w_ptr, scale_ptr, out_ptr, V, C: tl.constexpr, BLOCK: tl.constexpr,
                ROWS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    first = tl.program_id(0) * ROWS * STEPS
    end = tl.minimum(first + ROWS * STEPS, V)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    w = tile(w_ptr, first + tl.arange(0, ROWS), end, cols, mask, C)
    x = norm_row(x_ptr + b * C, weight_ptr, bias_ptr, cols, mask, C)
    products(x, w, w_ptr, scale_ptr, 0, out_ptr + b.to(tl.int64) * V, first, end, cols, mask, C, ROWS, STEPS, "")


class Rows(NamedTuple):
    """How the rows of a matrix of C columns are shared among programs."""

    C: int
    BLOCK: int
    ROWS: int
    STEPS: int

    @classmethod
    def of(cls, C: int, count: int, tuning: Tuning) -> "Rows":
        """For about `count` rows in all."""
        steps = max(1, triton.cdiv(count, tuning.tile_rows * tuning.programs))
        return cls(C, triton.next_power_of_2(C), tuning.tile_rows, steps)

    def programs(self, count: int) -> int:
        """How many take `count` rows."""
        return int(triton.cdiv(count, self.ROWS * self.STEPS))

    @property
    def options(self) -> dict[str, int]:
        return {**self._asdict(), "num_warps": max(1, min(8, self.BLOCK // 512))}


def shift_lora(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], maa: Tensor, w: Tensor, tuning: Tuning
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, C], prev [B, C], w [D, C] -> LN(x) [B, C], prev - LN(x) [B, C], W (LN(x) + dx maa) [B, D] float32."""
    (B, C), D = x.shape, w.shape[0]
    normed, dx, out = torch.empty_like(x), torch.empty_like(x), x.new_empty(B, D, dtype=torch.float32)
    rows = Rows.of(C, D, tuning)
    grid = (rows.programs(D), B)
    shift_lora_kernel[grid](x, prev, *norm, maa, w, normed, dx, out, D, **rows.options)
    return normed, dx, out


def kvrg(mixed: Tensor, w: Matrix, low: Tensor, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """mixed [5, B, C] (w, k, v, r, g), w [4, C, C], low [D, C] -> float32 k, v, r, g [4, B, C], the decay's [B, D]."""
    (_, B, C), D = mixed.shape, low.shape[0]
    out, low_out = mixed.new_empty(4, B, C, dtype=torch.float32), mixed.new_empty(B, D, dtype=torch.float32)
    rows = Rows.of(C, 4 * C, tuning)
    per = rows.programs(C)
    kvrg_kernel[4 * per + rows.programs(D), B](mixed, *w, low, out, low_out, B, D, per, **rows.options)
    return out, low_out


def add_product(y: Tensor, w: Matrix, x: Tensor, tuning: Tuning) -> None:
    """x += W y, for y, x [B, C] and w [C, C]."""
    B, C = x.shape
    rows = Rows.of(C, C, tuning)
    add_kernel[rows.programs(C), B](y, *w, x, **rows.options)


def key_receptance(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], maa: tuple[Tensor, Tensor], key: Matrix, receptance: Matrix,
    tuning: Tuning,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, prev [B, C], key [F, C], receptance [C, C] -> LN(x) [B, C], relu(key)^2 [B, F], sigmoid(receptance) [B, C].

    The last is float32. `prev` is left for `add_value` to update: here every program reads all of it.
    """
    (B, C), F = x.shape, key.weight.shape[0]
    normed, k, r = torch.empty_like(x), x.new_empty(B, F), x.new_empty(B, C, dtype=torch.float32)
    rows = Rows.of(C, F + C, tuning)
    keys = rows.programs(F)
    grid = (keys + rows.programs(C), B)
    key_receptance_kernel[grid](x, prev, *norm, *maa, *key, *receptance, normed, k, r, F, keys, **rows.options)
    return normed, k, r


def key_alone(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], maa: Tensor, key: Matrix, tuning: Tuning
) -> tuple[Tensor, Tensor]:
    """As `key_receptance` without the receptance, which RWKV-7 does not have."""
    (B, C), F = x.shape, key.weight.shape[0]
    normed, k = torch.empty_like(x), x.new_empty(B, F)
    rows = Rows.of(C, F, tuning)
    keys = rows.programs(F)
    none = (None, None)
    key_receptance_kernel[keys, B](x, prev, *norm, maa, None, *key, *none, normed, k, None, F, keys, **rows.options)
    return normed, k


def add_value(
    k: Tensor, r: Tensor | None, w: Matrix, normed: Tensor, x: Tensor, prev: Tensor, scale: float, tuning: Tuning
) -> None:
    """x = (x + r W^T k) scale and prev = normed, for k [B, F], w [F, C] and r (None: 1), normed, x, prev [B, C].

    The scales of w, if it has any, are of its columns.
    """
    (B, F), C = k.shape, x.shape[1]
    tall = min(tuning.value_rows, triton.next_power_of_2(F))
    grid = (triton.cdiv(C, tuning.value_cols), B)
    warps = max(1, min(16, tall * tuning.value_cols // 1024))  # 32 numbers a thread
    value_kernel[grid](k, r, *w, normed, x, prev, scale, C, F, tall, tuning.value_cols, num_warps=warps)


def head(x: Tensor, norm: tuple[Tensor, Tensor], w: Matrix, tuning: Tuning) -> Tensor:
    """x [B, C], w [V, C] -> W LN(x), float32 [B, V]."""
    (B, C), V = x.shape, w.weight.shape[0]
    out = x.new_empty(B, V, dtype=torch.float32)
    rows = Rows.of(C, V, tuning)
    head_kernel[rows.programs(V), B](x, *norm, *w, out, V, **rows.options)
    return out

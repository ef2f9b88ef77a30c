"""Layer norm, token shift and all that RWKV-7 multiplies with their result, as one kernel for few rows.

Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import load_vector, norm_row, store
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import Rows, products, tile


@triton.jit
def mixed_row(x_ptr, prev_ptr, weight_ptr, bias_ptr, mu_ptr, normed_ptr, cols, mask, keep, C: tl.constexpr):
    """The norm of a row, moved towards what the token before left; the first program keeps the former."""
    x = norm_row(x_ptr, weight_ptr, bias_ptr, cols, mask, C)
    if keep:
        store(normed_ptr + cols, x, mask)
    return x + (load_vector(prev_ptr, cols, mask) - x) * load_vector(mu_ptr, cols, mask)


@triton.jit
def rkv_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, mu_ptr, r_ptr, r_scale_ptr, k_ptr, k_scale_ptr, v_ptr,
               v_scale_ptr, down_ptr, which_ptr, normed_ptr, rkv_ptr, low_ptr, B, D, PER, C: tl.constexpr,
               BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    b = tl.program_id(1)
    part = tl.program_id(0) // PER
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    rows = tl.arange(0, ROWS)
    keep = tl.program_id(0) == 0
    x_at, prev_at, normed_at = x_ptr + b * C, prev_ptr + b * C, normed_ptr + b * C
    if part < 3:
        w_ptr = r_ptr
        scale_ptr = r_scale_ptr
        if part == 1:
            w_ptr = k_ptr
            scale_ptr = k_scale_ptr
        if part == 2:
            w_ptr = v_ptr
            scale_ptr = v_scale_ptr
        first = (tl.program_id(0) - part * PER) * ROWS * STEPS
        end = tl.minimum(first + ROWS * STEPS, C)
        w = tile(w_ptr, first + rows, end, cols, mask, C)
        mu = mu_ptr + tl.where(part == 0, 0, part + 1) * C  # of r, w, k, v, a, g
        x = mixed_row(x_at, prev_at, weight_ptr, bias_ptr, mu, normed_at, cols, mask, keep, C)
        out = rkv_ptr + (part * B + b) * C
        products(x, w, w_ptr, scale_ptr, 0, out, first, end, cols, mask, C, ROWS, STEPS, "")
    else:
        q = tl.program_id(0) - 3 * PER
        down = tile(down_ptr, q * ROWS + rows, D, cols, mask, C)
        mu_low = mu_ptr + tl.load(which_ptr + q) * C
        x_low = mixed_row(x_at, prev_at, weight_ptr, bias_ptr, mu_low, normed_at, cols, mask, keep, C)
        low = low_ptr + b * D
        products(x_low, down, down_ptr, None, 0, low, q * ROWS, q * ROWS + ROWS, cols, mask, C, ROWS, 1, "")


def rkv(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], mu: Tensor, matrices: tuple[Matrix, Matrix, Matrix],
    down: Tensor, which: Tensor, tuning: Tuning,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, prev [B, C], mu [6, C] (r, w, k, v, a, g), three matrices [C, C], down [D, C], which int32 [D / tile_rows].

    Returns LN(x) [B, C], r, k, v [3, B, C] and the first halves of the adapters [B, D], float32. Each tile of `down`
    belongs to the mixture that `which` names.
    """
    (B, C), D = x.shape, down.shape[0]
    normed, full = torch.empty_like(x), torch.float32
    out, low = x.new_empty(3, B, C, dtype=full), x.new_empty(B, D, dtype=full)
    rows = Rows.of(C, 3 * C, tuning)
    per = rows.programs(C)
    r, k, v = matrices
    rkv_kernel[3 * per + triton.cdiv(D, rows.ROWS), B](
        x, prev, *norm, mu, *r, *k, *v, down, which, normed, out, low, B, D, per, **rows.options
    )  # fmt: skip
    return normed, out, low

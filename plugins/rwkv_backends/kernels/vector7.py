"""Layer norm, token shift and all that RWKV-7 multiplies with their result, as one kernel for few rows.

Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, share, wait_for_earlier
from rwkv_backends.kernels.rows import Rows, columns, load_row, minus, norm_of, plus_product, store_row
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import first_tiles, products


@triton.jit
def mixed_row(x_ptr, weight, bias, prev, mu, normed_ptr, cols, keep, C: tl.constexpr):
    """The norm of a row, moved towards what the token before left; the first program keeps the former."""
    x = norm_of(x_ptr, weight, bias, cols, C)
    if keep:
        store_row(normed_ptr, x, cols, C)
    return plus_product(x, minus(prev, x), mu)


@triton.jit
def rkv_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, mu_ptr, r_ptr, r_scale_ptr, k_ptr, k_scale_ptr, v_ptr,
               v_scale_ptr, down_ptr, which_ptr, normed_ptr, rkv_ptr, low_ptr, B, D, PER, C: tl.constexpr,
               BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr,
               KEEP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    part = tl.program_id(0) // PER
    cols = columns(BLOCK, REST)
    keep = tl.program_id(0) == 0
    x_at, normed_at = x_ptr + b * C, normed_ptr + b * C
    weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
    prev = load_row(prev_ptr + b * C, cols, C)
    if part < 3:
        w_ptr = r_ptr
        scale_ptr = r_scale_ptr
        if part == 1:
            w_ptr = k_ptr
            scale_ptr = k_scale_ptr
        if part == 2:
            w_ptr = v_ptr
            scale_ptr = v_scale_ptr
        begin, stop = share(tl.program_id(0) - part * PER, PER, tl.cdiv(C, ROWS))
        tiles = first_tiles(w_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
        mu = load_row(mu_ptr + tl.where(part == 0, 0, part + 1) * C, cols, C)  # of r, w, k, v, a, g
        wait_for_earlier(OVERLAP)
        x = mixed_row(x_at, weight, bias, prev, mu, normed_at, cols, keep, C)
        out = rkv_ptr + (part * B + b) * C
        products(x, tiles, w_ptr, scale_ptr, 0, out, begin, stop, C, cols, C, ROWS, MORE, "", KEEP)
    else:
        q = tl.program_id(0) - 3 * PER
        down = first_tiles(down_ptr, q, q + 1, D, cols, C, ROWS, 1, KEEP)
        mu = load_row(mu_ptr + tl.load(which_ptr + q) * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = mixed_row(x_at, weight, bias, prev, mu, normed_at, cols, keep, C)
        products(x, down, down_ptr, None, 0, low_ptr + b * D, q, q + 1, D, cols, C, ROWS, False, "", KEEP)


def rkv(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], mu: Tensor, matrices: tuple[Matrix, Matrix, Matrix],
    down: Tensor, which: Tensor, tuning: Tuning,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, prev [B, C], mu [6, C] (r, w, k, v, a, g), three matrices [C, C], down [D, C], which int32, one a tile.

    Returns LN(x) [B, C], r, k, v [3, B, C] and the first halves of the adapters [B, D], float32. Each tile of `down`
    belongs to the mixture that `which` names.
    """
    (B, C), D = x.shape, down.shape[0]
    normed, full = torch.empty_like(x), torch.float32
    out, low = x.new_empty(3, B, C, dtype=full), x.new_empty(B, D, dtype=full)
    rows = Rows(C, 3 * C, tuning)
    per = rows.programs(C)
    r, k, v = matrices
    rkv_kernel[3 * per + triton.cdiv(D, rows.tile_rows()), B](
        x, prev, *norm, mu, *r, *k, *v, down, which, normed, out, low, B, D, per,
        **rows.options(x, rows.ahead_normed(), (C, per)),
    )  # fmt: skip
    return normed, out, low

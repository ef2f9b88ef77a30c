"""Layer norm, token shift and all that RWKV-7 multiplies with their result, as one kernel for few rows.

Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.adapters7 import Adapters
from rwkv_backends.kernels.device import let_next_begin, share, wait_for_earlier
from rwkv_backends.kernels.rows import Rows, columns, load_row, minus, norm_of, plus_product, store_row, widened
from rwkv_backends.kernels.sizes import cdiv
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import first_tiles, products


@triton.jit
def mixed_row(x_ptr, weight, weight_ptr, bias, bias_ptr, prev, prev_ptr, mu, mu_ptr, normed_ptr, cols, keep,
              C: tl.constexpr):  # fmt: skip
    """The norm of a row, moved towards what the token before left; the first program keeps the former."""
    x = norm_of(x_ptr, widened(weight, weight_ptr), widened(bias, bias_ptr), cols, C)
    if keep:
        store_row(normed_ptr, x, cols, C)
    return plus_product(x, minus(widened(prev, prev_ptr), x), widened(mu, mu_ptr))


@triton.jit
def rkv_kernel(x_ptr, prev_ptr, weight_ptr, bias_ptr, mu_ptr, w_ptr, scale_ptr, down_ptr, tiles_ptr, normed_ptr,
               rkv_ptr, low_ptr, B, D, RANK, PER, C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
               ROWS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr, TOGETHER: tl.constexpr, KEEP: tl.constexpr,
               OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    b = tl.program_id(1)
    part = tl.program_id(0) // PER
    cols = columns(BLOCK, REST)
    keep = tl.program_id(0) == 0
    x_at, normed_at = x_ptr + b * C, normed_ptr + b * C
    weight, bias = load_row(weight_ptr, cols, C), load_row(bias_ptr, cols, C)
    prev = load_row(prev_ptr + b * C, cols, C)
    if part < 3:
        w_ptr += part * C * C
        if scale_ptr is not None:
            scale_ptr += part * C
        begin, stop = share(tl.program_id(0) - part * PER, PER, tl.cdiv(C, ROWS))
        tiles = first_tiles(w_ptr, begin, stop, C, cols, C, ROWS, AHEAD, KEEP)
        mu = load_row(mu_ptr + part * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = mixed_row(x_at, weight, weight_ptr, bias, bias_ptr, prev, prev_ptr, mu, mu_ptr, normed_at, cols, keep, C)
        out = rkv_ptr + (part * B + b) * C
        products(x, tiles, w_ptr, scale_ptr, 0, out, begin, stop, C, cols, C, ROWS, MORE, "", TOGETHER, KEEP)
    else:
        q = tl.load(tiles_ptr + tl.program_id(0) - 3 * PER)
        down = first_tiles(down_ptr, q, q + 1, D, cols, C, ROWS, 1, KEEP)
        mu = load_row(mu_ptr + (6 - D // RANK + q * ROWS // RANK) * C, cols, C)
        wait_for_earlier(OVERLAP)
        x = mixed_row(x_at, weight, weight_ptr, bias, bias_ptr, prev, prev_ptr, mu, mu_ptr, normed_at, cols, keep, C)
        products(x, down, down_ptr, None, 0, low_ptr + b * D, q, q + 1, D, cols, C, ROWS, False, "", TOGETHER, KEEP)


def rkv(
    x: Tensor, prev: Tensor, norm: tuple[Tensor, Tensor], mu: Tensor, matrices: Matrix, down: Tensor, tiles: Tensor,
    tuning: Tuning,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, prev [B, C], mu [6, C] (r, k, v, a, w, g), matrices [3, C, C], down [n, R, C], of the last n of mu.

    Returns LN(x) [B, C], r, k, v [3, B, C] and the first halves of the adapters [B, n R], float32, of which `tiles`,
    int32, names those that are wanted.
    """
    (B, C), (n, R, _) = x.shape, down.shape
    normed, full = torch.empty_like(x), torch.float32
    out, low = x.new_empty(3, B, C, dtype=full), x.new_empty(B, n * R, dtype=full)
    rows = Rows(C, 3 * C, tuning)
    per = rows.programs(C)
    rkv_kernel[3 * per + len(tiles), B](
        x, prev, *norm, mu, *matrices, down, tiles, normed, out, low, B, n * R, R, per,
        **rows.options(x, rows.ahead_normed(), (C, per)),
    )  # fmt: skip
    return normed, out, low


def tiles_of(adapters: Adapters, tuning: Tuning) -> Tensor:
    """Tiles of the rows of `adapters.down` that are not only filled up with zeros, int32."""
    n, R, C = adapters.down.shape
    rows = tile_rows(C, tuning)
    per = [range(i * R // rows, i * R // rows + cdiv(rank, rows)) for i, rank in enumerate(adapters.ranks[-n:])]
    return torch.tensor([tile for tiles in per for tile in tiles], dtype=torch.int32).to(adapters.down.device)


def tile_rows(C: int, tuning: Tuning) -> int:
    """Rows of a tile of the kernel's matrices."""
    return Rows(C, 3 * C, tuning).tile_rows()

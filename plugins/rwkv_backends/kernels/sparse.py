"""The value matrix for the few rows of a decode step: rows of it whose input is zero are not read.

Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, share, store, wait_for_earlier
from rwkv_backends.kernels.tuning import Tuning


@triton.jit
def value_tile(w_ptr, rows, wanted, cols, mask, C: tl.constexpr):
    """A load that is masked out costs no traffic: rows of [F, C] that are not wanted are skipped."""
    return tl.load(w_ptr + rows[:, None] * C + cols[None, :], mask=wanted[:, None] & mask[None, :], other=0.0)


@triton.jit
def value_kernel(k_ptr, r_ptr, w_ptr, scale_ptr, normed_ptr, x_ptr, prev_ptr, parts_ptr, arrived_ptr, scale, SPLITS,
                 C: tl.constexpr, F: tl.constexpr, TALL: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """Programs that share columns each add up some of the rows; the one that comes last adds up what they have.

    Rows whose input is zero are skipped, losslessly; where kernels overlap, not those read before it is known.
    """
    let_next_begin(OVERLAP)
    block, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    B = tl.num_programs(2)
    cols = block * COLS + tl.arange(0, COLS)
    mask = cols < C
    begin, stop = share(split, SPLITS, tl.cdiv(F, TALL))
    end = tl.minimum(stop * TALL, F)
    rows = begin * TALL + tl.arange(0, TALL)
    k_ptr += b * F
    if OVERLAP:
        w = value_tile(w_ptr, rows, rows < end, cols, mask, C)
        ahead = value_tile(w_ptr, rows + TALL, rows + TALL < end, cols, mask, C)
    wait_for_earlier(OVERLAP)
    k, k_ahead = load_vector(k_ptr, rows, rows < end), load_vector(k_ptr, rows + TALL, rows + TALL < end)
    k_later = load_vector(k_ptr, rows + 2 * TALL, rows + 2 * TALL < end)
    if not OVERLAP:
        w = value_tile(w_ptr, rows, k != 0.0, cols, mask, C)
        ahead = value_tile(w_ptr, rows + TALL, k_ahead != 0.0, cols, mask, C)
    total = tl.zeros((TALL, COLS), tl.float32)
    for _ in range(begin, stop):
        later = value_tile(w_ptr, rows + 2 * TALL, k_later != 0.0, cols, mask, C)
        rows += TALL
        total += w.to(tl.float32) * k[:, None]
        w = ahead
        ahead = later
        k = k_ahead
        k_ahead = k_later
        k_later = load_vector(k_ptr, rows + 2 * TALL, rows + 2 * TALL < end)
    tl.store(parts_ptr + (split * B + b) * C + cols, tl.sum(total, 0), mask=mask)
    tl.debug_barrier()  # all of it is written before the arrival is counted
    arrived = arrived_ptr + b * tl.num_programs(0) + block
    if tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived, 0)  # for the next step
        splits = tl.arange(0, WIDE)
        parts_at = parts_ptr + (splits[:, None] * B + b) * C + cols[None, :]
        parts_mask = (splits < SPLITS)[:, None] & mask[None, :]
        y = tl.sum(tl.load(parts_at, mask=parts_mask, other=0.0, cache_modifier=".cg"), 0)
        at = b * C + cols
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + cols, mask=mask, other=0.0)
        if r_ptr is not None:
            y *= tl.load(r_ptr + at, mask=mask, other=0.0)
        store(x_ptr + at, (load_vector(x_ptr + b * C, cols, mask) + y) * scale, mask)
        store(prev_ptr + at, tl.load(normed_ptr + at, mask=mask, other=0.0), mask)


def add_value(
    k: Tensor, r: Tensor | None, w: Matrix, normed: Tensor, x: Tensor, prev: Tensor, scale: float, arrived: Tensor,
    tuning: Tuning,
) -> None:  # fmt: skip
    """x = (x + r W^T k) scale and prev = normed, for k [B, F], w [F, C] and r (None: 1), normed, x, prev [B, C].

    The scales of w, if it has any, are of its columns. `arrived`, of `arrivals`, counts programs and is zero again
    afterwards.
    """
    (B, F), C = k.shape, x.shape[1]
    tall, cols = min(tuning.value_rows, triton.next_power_of_2(F)), min(tuning.value_cols, triton.next_power_of_2(C))
    blocks = triton.cdiv(C, cols)
    splits = max(1, min(triton.cdiv(F, tall), tuning.programs // blocks))
    parts = x.new_empty(splits, B, C, dtype=torch.float32)
    value_kernel[blocks, splits, B](
        k, r, *w, normed, x, prev, parts, arrived, scale, splits, C, F, tall, cols, triton.next_power_of_2(splits),
        num_warps=max(1, min(8, tall * cols // 1024)), **tuning.launch,
    )  # fmt: skip


def arrivals(like: Tensor, C: int, tuning: Tuning) -> Tensor:
    """What `add_value` counts with, on the device of `like`, for as many rows as it is used for."""
    blocks = triton.cdiv(C, min(tuning.value_cols, triton.next_power_of_2(C)))
    return torch.zeros(max(1, tuning.vector_rows) * blocks, dtype=torch.int32, device=like.device)

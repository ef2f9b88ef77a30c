"""The key matrix of the channel mixing for many rows, with the square of what is positive taken before it is written.

Annotations are real types, not strings: Triton reads them.
"""

import triton
import triton.language as tl
from rwkv_layers.linear import Matrix, linear
from torch import Tensor

from rwkv_backends.kernels import mixing
from rwkv_backends.kernels.device import store
from rwkv_backends.kernels.tuning import Tuning


@triton.jit(do_not_specialize=["M"])
def key_kernel(x_ptr, w_ptr, out_ptr, M, D, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               K: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # the programs of one part of the weights in a row
    d = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    x_at = x_ptr + (m % M)[:, None] * C  # rows that do not exist are computed from others, and not stored
    w_at = w_ptr + (d % D)[None, :] * C
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, C, K):
        c = start + tl.arange(0, K)
        x = tl.load(x_at + c[None, :], mask=(c < C)[None, :], other=0.0)
        w = tl.load(w_at + c[:, None], mask=(c < C)[:, None], other=0.0)
        sums = tl.dot(x, w, sums)
    k = tl.maximum(sums, 0.0)
    store(out_ptr + m[:, None] * D + d[None, :], k * k, (m < M)[:, None] & (d < D)[None, :])


def squared(x: Tensor, key: Matrix, tuning: Tuning) -> Tensor:
    """relu(x W^T)^2 [M, D]: x [M, C], W [D, C]."""
    if key.scale is not None or x.element_size() != 2 or len(x) > tuning.key_rows:
        return mixing.relu_squared(linear(x, key))
    return multiplied(x, key.weight)


def multiplied(x: Tensor, w: Tensor) -> Tensor:
    """relu(x W^T)^2 [M, D] in one kernel: x [M, C], w [D, C], both bfloat16 or float16."""
    (M, C), D = x.shape, len(w)
    out = x.new_empty(M, D)
    rows = 64 if M <= 64 else 128
    grid = triton.cdiv(M, rows), triton.cdiv(D, 128)
    key_kernel[grid](x, w, out, M, D, C, rows, 128, 64, num_warps=rows // 16, num_stages=4)
    return out

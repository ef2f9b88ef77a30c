"""What lies between the matrix products, for rows of any number: norms, token shift, interpolation, gates.

M = B T rows of C channels; row m is token m % T of sequence m // T. Kernels are not specialized on these, so that
another length of prompt compiles nothing. Annotations are real types, not strings: Triton reads them.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, norm_row, store, tanh, wait_for_earlier
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

SQUARES = 8192
"""Numbers that one program squares."""


@triton.jit
def embed_kernel(tokens_ptr, emb_ptr, weight_ptr, bias_ptr, x_ptr, C: tl.constexpr, BLOCK: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """The first kernel of a step. It lets the next begin only when all before it is done: so what this step reads
    before it waits, such as the states, is what the last one has written."""
    wait_for_earlier(OVERLAP)
    let_next_begin(OVERLAP)
    m = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    x = norm_row(emb_ptr + tl.load(tokens_ptr + m) * C, weight_ptr, bias_ptr, cols, mask, C)
    store(x_ptr + m * C + cols, x, mask)


@triton.jit
def shifted(normed_ptr, prev_ptr, x, start, row, cols, at, mask, T, C: tl.constexpr):
    """What the rows before those of x leave, minus these."""
    m = start.to(tl.int32) + row  # whole numbers of 64 bits take long to divide
    first = m % T == 0
    before = tl.load(normed_ptr + start * C - C + at, mask=mask & (m % T > 0), other=0.0)
    prev = tl.load(prev_ptr + m // T * C + cols[None, :], mask=mask & first, other=0.0)
    dx = tl.where(first, prev, before).to(tl.float32) - x.to(tl.float32)
    return dx.to(x.dtype)


@triton.jit(do_not_specialize=["M", "T"])
def lerps_kernel(lora_ptr, normed_ptr, w_ptr, out_ptr, prev_ptr, M, T, R: tl.constexpr, C: tl.constexpr,
                 RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    start = tl.program_id(0).to(tl.int64) * ROWS
    row, rank = tl.arange(0, ROWS)[:, None], tl.arange(0, RANK)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.program_id(2) * PARTS
    live = row < M - start
    mask = live & (cols < C)[None, :]
    at = row * C + cols[None, :]
    x = tl.load(normed_ptr + start * C + at, mask=mask, other=0.0)
    dx = shifted(normed_ptr, prev_ptr, x, start, row, cols, at, mask, T, C)
    for part in tl.range(PARTS, num_stages=3):  # the weights of the next parts are on their way
        i = first + part
        lora_at = lora_ptr + start * (5 * R) + i * R + row * (5 * R) + rank[None, :]
        lora = tl.load(lora_at, mask=live & (rank < R)[None, :], other=0.0)
        w_at = w_ptr + i * (R + 1) * C + rank[:, None] * C + cols[None, :]
        w = tl.load(w_at, mask=(rank < R)[:, None] & (cols < C)[None, :], other=0.0)
        maa = load_vector(w_ptr + (i * (R + 1) + R) * C, cols, cols < C)
        mix = tl.dot(tanh(lora.to(tl.float32)).to(w.dtype), w, input_precision="ieee") + maa[None, :]
        store(out_ptr + (i * tl.cast(M, tl.int64) + start) * C + at, x.to(tl.float32) + dx.to(tl.float32) * mix, mask)


@triton.jit
def relu_squared_kernel(k_ptr, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    # The last first: it is what the cache still has, and what is squared last is what the next product begins with.
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.maximum(tl.load(k_ptr + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    store(k_ptr + at, k * k, at < size)


def across(C: int) -> dict[str, int]:
    """Options of a kernel whose programs each hold a row of C channels."""
    block = next_power_of_2(C)
    return {"C": C, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def embed(tokens: Tensor, emb: Tensor, norm: tuple[Tensor, Tensor], tuning: Tuning) -> Tensor:
    """tokens int64 [M], emb [V, C] -> their rows after a layer norm [M, C]."""
    C = emb.shape[1]
    x = emb.new_empty(len(tokens), C)
    embed_kernel[len(tokens),](tokens, emb, *norm, x, **across(C), **tuning.launch)
    return x


def lerps(lora: Tensor, normed: Tensor, w: Tensor, prev: Tensor, T: int, tuning: Tuning) -> Tensor:
    """normed + dx (tanh(lora) W + maa): lora [M, 5R], w [5, R + 1, C], its last row maa -> [5, M, C].

    dx is what the token before leaves, for the first one prev [B, C], minus normed [M, C].
    """
    (M, C), R = normed.shape, w.shape[1] - 1
    out = normed.new_empty(5, M, C)
    rows, cols = tuning.lerp_tile(M, C, w.element_size())
    rank = max(16, next_power_of_2(R))
    parts = tuning.lerp_parts(M)
    grid = (cdiv(M, rows), cdiv(C, cols), 5 // parts)
    lerps_kernel[grid](
        lora, normed, w, out, prev, M, T, R, C, rank, rows, cols, parts,
        # Four programs share a multiprocessor, with larger adapters three.
        num_warps=4, maxnreg=128 if rank <= 32 else 168, **tuning.launch,
    )  # fmt: skip
    return out


def relu_squared(k: Tensor, tuning: Tuning) -> Tensor:
    """In place."""
    relu_squared_kernel[cdiv(k.numel(), SQUARES),](k, k.numel(), SQUARES, num_warps=8, **tuning.launch)
    return k

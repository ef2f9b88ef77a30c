"""Many tokens through RWKV-6's WKV, a chunk of L at a time.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(w_t) S + k_t^T v_t

What the tokens of a chunk see of each other needs no state: all chunks at once. Then one program for each head and
block of the state's columns goes through the chunks in turn. Decays are only ever multiplied, each at most 1, never
divided: nothing overflows and nothing cancels, however strong they are. All arithmetic is float32.
Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import store, tanh
from rwkv_backends.kernels.tuning import Tuning


@triton.jit(do_not_specialize=["M"])
def decays_kernel(low_ptr, w_ptr, decay_ptr, out_ptr, M, D: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    rank = tl.arange(0, RANK)
    low_mask = (m < M)[:, None] & (rank < D)[None, :]
    low = tl.load(low_ptr + m[:, None] * D + rank[None, :], mask=low_mask, other=0.0)
    w_mask = (rank < D)[:, None] & (cols < C)[None, :]
    w = tl.load(w_ptr + cols[None, :] * D + rank[:, None], mask=w_mask, other=0.0)
    raw = tl.dot(tanh(low.to(tl.float32)).to(w.dtype), w, input_precision="ieee")
    raw += tl.load(decay_ptr + cols, mask=cols < C, other=0.0)[None, :]
    mask = (m < M)[:, None] & (cols < C)[None, :]
    tl.store(out_ptr + m[:, None] * C + cols[None, :], tl.exp(-tl.exp(raw)), mask=mask)


@triton.jit(do_not_specialize=["M", "T"])
def within_kernel(kvrg_ptr, w_ptr, u_ptr, r_ptr, k_ptr, kept_ptr, out_ptr, M, T, H, N: tl.constexpr,
                  L: tl.constexpr):  # fmt: skip
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    start = b * T + c * L
    count = T - c * L  # tokens from the start of this chunk on
    own = i[:, None] * C + h * N + n[None, :]
    at = start * C + own
    mask = (i < count)[:, None] & (n < N)[None, :]
    k = tl.load(kvrg_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [L, N]
    v = tl.load(kvrg_ptr + (M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
    r_from = kvrg_ptr + (2 * M + start) * C + h * N + n
    r = tl.load(kvrg_ptr + (2 * M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
    bonus = tl.sum(r * tl.load(u_ptr + h * N + n)[None, :] * k, 1)
    scores = tl.where(i[:, None] == i[None, :], bonus[:, None], 0.0)  # [of token, from token]
    kept = tl.full((N,), 1.0, tl.float32)
    for t in range(L):
        row = (start + t) * C + h * N + n
        live = n < tl.where(t < count, N, 0)
        w_t = tl.load(w_ptr + row, mask=live, other=1.0)
        r_t = tl.load(r_from + t * C, mask=live, other=0.0).to(tl.float32)
        seen = tl.sum(k * r_t[None, :], 1)  # k as it stands before token t
        scores = tl.where((i[:, None] == t) & (i[None, :] < t), seen[None, :], scores)
        tl.store(r_ptr + row, r_t * kept, mask=live)
        kept *= w_t
        k = tl.where((i < t)[:, None], k * w_t[None, :], k)
    tl.store(k_ptr + at, k, mask=mask)
    tl.store(kept_ptr + ((b * tl.num_programs(0) + c) * H + h) * N + n, kept)
    tl.store(out_ptr + at, tl.dot(scores, v, input_precision="ieee"), mask=mask)


@triton.jit(do_not_specialize=["M", "T"])
def through_kernel(kvrg_ptr, r_ptr, k_ptr, kept_ptr, kv_ptr, out_ptr, M, T, H, N: tl.constexpr, L: tl.constexpr,
                   COLS: tl.constexpr):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    v = tl.program_id(1) * COLS + tl.arange(0, COLS)
    kv_at = kv_ptr + (b * H + h) * N * N + n[:, None] * N + v[None, :]
    s = tl.load(kv_at)  # [N, COLS]
    chunks = tl.cdiv(T, L)
    for c in range(chunks):
        live = c * L + i < T
        token = b * T + c * L + i
        row = token * C + h * N
        r = tl.load(r_ptr + row[:, None] + n[None, :], mask=live[:, None], other=0.0)
        out = tl.load(out_ptr + row[:, None] + v[None, :], mask=live[:, None], other=0.0)
        out += tl.dot(r, s, input_precision="ieee")
        tl.store(out_ptr + row[:, None] + v[None, :], out, mask=live[:, None])
        k = tl.load(k_ptr + row[None, :] + n[:, None], mask=live[None, :], other=0.0)  # [N, L]
        value_at = (M + token)[:, None] * C + h * N + v[None, :]
        value = tl.load(kvrg_ptr + value_at, mask=live[:, None], other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + ((b * chunks + c) * H + h) * N + n)
        s = s * kept[:, None] + tl.dot(k, value, input_precision="ieee")
    tl.store(kv_at, s)


@triton.jit
def norm_gate_kernel(o_ptr, g_ptr, weight_ptr, bias_ptr, out_ptr, H, N: tl.constexpr, HEADS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    n = tl.arange(0, N)
    own = h[:, None] * N + n[None, :]
    mask = (h < H)[:, None] & (n < N)[None, :]
    at = m * H * N + own
    o = tl.load(o_ptr + at, mask=mask, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    apart = o - (tl.sum(o, 1) / N)[:, None]
    normed = apart * tl.rsqrt(tl.sum(apart * apart, 1) / N + 64e-5)[:, None]
    weight = tl.load(weight_ptr + own, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + own, mask=mask, other=0.0)
    store(out_ptr + at, (normed * weight + bias) * g * tl.sigmoid(g), mask)


def decays(low: Tensor, w: Tensor, decay: Tensor, tuning: Tuning) -> Tensor:
    """exp(-exp(decay + W tanh(low))), float32 [M, C]: low [M, D], w [C, D], decay [C]."""
    (M, D), C = low.shape, len(decay)
    out = decay.new_empty(M, C)
    rows, cols = tuning.lerp_tile(M, C, w.element_size())
    rank = max(16, triton.next_power_of_2(D))
    decays_kernel[triton.cdiv(M, rows), triton.cdiv(C, cols)](low, w, decay, out, M, D, C, rank, rows, cols)
    return out


def wkv_chunked(kvrg: Tensor, w: Tensor, u: Tensor, kv: Tensor, tuning: Tuning) -> Tensor:
    """kvrg [4, M, C], w float32 [M, C], u [H, N], kv float32 [B, H, K, V], updated in place -> float32 [M, C].

    The rows of kv are contiguous: one layer of a state, or of a view of its rows.
    """
    M = kvrg.shape[1]
    B, H, N, _ = kv.shape
    T, L = M // B, tuning.chunk
    r, k, out = (torch.empty_like(w) for _ in range(3))
    chunks = triton.cdiv(T, L)
    kept = w.new_empty(B, chunks, H, N)
    within_kernel[chunks, H, B](kvrg, w, u, r, k, kept, out, M, T, H, N, L, num_warps=2)
    cols = min(tuning.state_cols, N)
    through_kernel[B * H, N // cols](kvrg, r, k, kept, kv, out, M, T, H, N, L, cols)
    return out


def norm_gate(o: Tensor, g: Tensor, norm: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """LN_head(o) silu(g) [M, C], of the dtype of `like`: o float32 [M, C], g [M, C], both of norm [H, N]."""
    M, C = o.shape
    H, N = norm[0].shape
    out = like.new_empty(M, C)
    heads = triton.next_power_of_2(H)
    norm_gate_kernel[M,](o, g, *norm, out, H, N, heads, num_warps=max(1, min(8, heads * N // 512)))
    return out

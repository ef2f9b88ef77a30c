"""Many tokens through RWKV-6's WKV, all spans of a prompt at once.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(w_t) S + k_t^T v_t

What the L tokens of a chunk see of each other needs no state: all chunks at once. Nor does what a span of chunks adds
to the state, and the share of it that it keeps: all spans at once. Carrying the state through the spans is then one
product and one sum an entry. From the state that it starts from, each span is worked out by itself, a chunk at a time,
with the norm and the gate that follow. Decays are only ever
multiplied, each at most 1, never divided: nothing overflows and nothing cancels, however strong they are. All
arithmetic is float32; "tf32x3" keeps its precision on tensor cores, in three products of parts.
Annotations are real types, not strings: Triton reads them.
"""

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
def pairs_kernel(kvrg_ptr, w_ptr, u_ptr, scores_ptr, M, T, H, N: tl.constexpr, L: tl.constexpr):
    """What each token of a chunk sees of those before it, and of itself by the bonus: [L, L] a chunk."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    start = b * T + c * L
    count = T - c * L  # tokens from the start of this chunk on
    own = i[:, None] * C + h * N + n[None, :]
    mask = (i < count)[:, None] & (n < N)[None, :]
    k = tl.load(kvrg_ptr + start * C + own, mask=mask, other=0.0).to(tl.float32)  # [L, N]
    r = tl.load(kvrg_ptr + (2 * M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
    bonus = tl.sum(r * tl.load(u_ptr + h * N + n)[None, :] * k, 1)
    scores = tl.where(i[:, None] == i[None, :], bonus[:, None], 0.0)  # [of token, from token]
    w_at, r_at = w_ptr + start * C + h * N + n, kvrg_ptr + (2 * M + start) * C + h * N + n
    first = n < tl.where(count > 0, N, 0)
    w_t = tl.load(w_at, mask=first, other=1.0)
    r_t = tl.load(r_at, mask=first, other=0.0).to(tl.float32)
    for t in range(L):
        here = n < tl.where(t + 1 < tl.minimum(count, L), N, 0)
        w_next = tl.load(w_at + (t + 1) * C, mask=here, other=1.0)  # on its way while this token is worked on
        r_next = tl.load(r_at + (t + 1) * C, mask=here, other=0.0).to(tl.float32)
        seen = tl.sum(k * r_t[None, :], 1)  # k as it stands before token t
        scores = tl.where((i[:, None] == t) & (i[None, :] < t), seen[None, :], scores)
        k = tl.where((i < t)[:, None], k * w_t[None, :], k)
        w_t, r_t = w_next, r_next
    at = ((b * tl.num_programs(0) + c) * H + h) * L * L
    tl.store(scores_ptr + at + i[:, None] * L + i[None, :], scores)


@triton.jit(do_not_specialize=["M", "T", "slots"])
def added_kernel(kvrg_ptr, w_ptr, states_ptr, kept_ptr, M, T, slots, H, N: tl.constexpr, SPAN: tl.constexpr):
    """What a whole span adds to the state, into the slot of the next span, and the share of the state that it keeps."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * N
    i = tl.arange(0, SPAN)
    n = tl.arange(0, N)
    own = i[:, None] * C + h * N + n[None, :]
    start = b * T + c * SPAN
    k = tl.load(kvrg_ptr + start * C + own).to(tl.float32)  # [SPAN, N]
    v = tl.load(kvrg_ptr + (M + start) * C + own).to(tl.float32)
    following = tl.load(w_ptr + (start + 1) * C + own, mask=(i < SPAN - 1)[:, None], other=1.0)
    after = tl.cumprod(following, 0, reverse=True)  # all decays that come after each token
    kept = tl.load(w_ptr + start * C + h * N + n) * tl.sum(tl.where(i[:, None] == 0, after, 0.0), 0)
    slot = (b * slots + c + 1) * H + h
    tl.store(kept_ptr + slot * N + n, kept)
    at = states_ptr + slot * N * N + n[:, None] * N + n[None, :]
    tl.store(at, tl.dot(tl.trans(k * after), v, input_precision="tf32x3"))


@triton.jit(do_not_specialize=["slots"])
def carry_kernel(kv_ptr, kept_ptr, states_ptr, slots, H, N: tl.constexpr, BLOCK: tl.constexpr):
    """What each span adds becomes the state that the next one starts from, all entries of all states at once."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(kv_ptr + (b * H + h) * N * N + at)
    slot = b * slots * H + h
    tl.store(states_ptr + slot * N * N + at, s)
    for _ in tl.range(1, slots, num_stages=4):
        slot += H
        s = s * tl.load(kept_ptr + slot * N + at // N) + tl.load(states_ptr + slot * N * N + at)
        tl.store(states_ptr + slot * N * N + at, s)


@triton.jit(do_not_specialize=["M", "T", "slots"])
def outputs_kernel(kvrg_ptr, w_ptr, scores_ptr, weight_ptr, bias_ptr, states_ptr, kv_ptr, out_ptr, M, T, slots, H,
                   N: tl.constexpr, SPAN: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """A span from the state it starts from, L tokens at a time. The last span leaves its end in kv."""
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    own = i[:, None] * C + h * N + n[None, :]
    square = n[:, None] * N + n[None, :]
    weight, bias = tl.load(weight_ptr + h * N + n), tl.load(bias_ptr + h * N + n)
    s = tl.load(states_ptr + ((b * slots + c) * H + h) * N * N + square)  # [K, V]
    for done in range(c * SPAN, tl.minimum((c + 1) * SPAN, T), L):
        start = b * T + done
        live = i < T - done
        mask = live[:, None] & (n < N)[None, :]
        k = tl.load(kvrg_ptr + start * C + own, mask=mask, other=0.0).to(tl.float32)  # [L, N]
        v = tl.load(kvrg_ptr + (M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(kvrg_ptr + (2 * M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
        earlier = tl.load(w_ptr + (start - 1) * C + own, mask=mask & (i > 0)[:, None], other=1.0)
        later = tl.load(w_ptr + (start + 1) * C + own, mask=(i + 1 < tl.minimum(T - done, L))[:, None], other=1.0)
        before, after = tl.cumprod(earlier, 0), tl.cumprod(later, 0, reverse=True)  # decays to each end of the chunk
        kept = tl.load(w_ptr + start * C + h * N + n) * tl.sum(tl.where(i[:, None] == 0, after, 0.0), 0)
        scores_at = scores_ptr + ((b * tl.cdiv(T, L) + done // L) * H + h) * L * L
        scores = tl.load(scores_at + i[:, None] * L + i[None, :])
        o = tl.dot(scores, v, input_precision="tf32x3")
        o += tl.dot(r * before, s, input_precision="tf32x3")
        s = s * kept[:, None] + tl.dot(tl.trans(k * after), v, input_precision="tf32x3")
        apart = o - (tl.sum(o, 1) / N)[:, None]
        normed = apart * tl.rsqrt(tl.sum(apart * apart, 1) / N + 64e-5)[:, None]
        g = tl.load(kvrg_ptr + (3 * M + start) * C + own, mask=mask, other=0.0).to(tl.float32)
        store(out_ptr + start * C + own, (normed * weight[None, :] + bias[None, :]) * g * tl.sigmoid(g), mask)
    if c == slots - 1:
        tl.store(kv_ptr + (b * H + h) * N * N + square, s)


def decays(low: Tensor, w: Tensor, decay: Tensor, tuning: Tuning) -> Tensor:
    """exp(-exp(decay + W tanh(low))), float32 [M, C]: low [M, D], w [C, D], decay [C]."""
    (M, D), C = low.shape, len(decay)
    out = decay.new_empty(M, C)
    rows, cols = tuning.lerp_tile(M, C, w.element_size())
    rank = max(16, triton.next_power_of_2(D))
    decays_kernel[triton.cdiv(M, rows), triton.cdiv(C, cols)](low, w, decay, out, M, D, C, rank, rows, cols)
    return out


def wkv(
    kvrg: Tensor, w: Tensor, u: Tensor, norm: tuple[Tensor, Tensor], kv: Tensor, like: Tensor, tuning: Tuning
) -> Tensor:
    """kvrg [4, M, C], w float32 [M, C]; u and both of norm [H, N] -> LN_head(o) silu(g) [M, C], of the dtype of `like`.

    kv float32 [B, H, K, V] is updated in place; its rows are contiguous: one layer of a state, or of a view of its
    rows.
    """
    _, M, C = kvrg.shape
    B, H, N, _ = kv.shape
    T, span, L = M // B, tuning.span, tuning.chunk
    chunks, slots = triton.cdiv(T, L), triton.cdiv(T, span)
    scores = kv.new_empty(B, chunks, H, L, L)
    pairs_kernel[chunks, H, B](kvrg, w, u, scores, M, T, H, N, L, num_warps=1)
    states = kv  # what each span starts from
    if slots > 1:
        states, kept = kv.new_empty(B, slots, H, N, N), kv.new_empty(B, slots, H, N)
        added_kernel[slots - 1, H, B](kvrg, w, states, kept, M, T, slots, H, N, span, num_warps=max(1, N // 16))
        block = min(N * N, 512)
        carry_kernel[B * H, N * N // block](kv, kept, states, slots, H, N, block)
    out = like.new_empty(M, C)
    stages = 2 if N < 128 else 1  # loads under way take shared memory, of which large heads leave little
    outputs_kernel[slots, H, B](
        kvrg, w, scores, *norm, states, kv, out, M, T, slots, H, N, span, L,
        num_warps=max(1, N // 16), num_stages=stages,
    )  # fmt: skip
    return out

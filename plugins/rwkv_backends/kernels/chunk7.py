"""Many tokens through RWKV-7's WKV (a generalised delta rule), a chunk of L at a time.

    S <- (diag(w_t) + b_t a_t^T) S + k_t v_t^T        o_t = r_t^T S

With u_t = a_t^T S_{t-1}, what a chunk makes of the state S_0 before it is linear in S_0 (the UT transform of the delta
rule: Yang et al., arXiv:2406.06484):

    u = U S_0 + u_own        o = O S_0 + o_own        S_L = diag(w_1 ... w_L) S_0 + K^T v + B^T u

U, O, K, B [L, N] and what is their own need no state: all chunks at once. A span of chunks makes P S + Q of a state S,
and P and Q [N, N] need none either: all spans at once. Carrying the state through the spans is then one product each,
and from the state that it starts from each span is worked out by itself. Decays are only ever multiplied, each at most
1, never divided. All arithmetic is float32; "tf32x3" keeps its precision on tensor cores, in three products of parts.
Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import store_state
from rwkv_backends.kernels.tuning import Tuning


@triton.jit(do_not_specialize=["T"])
def within_kernel(r_ptr, w_ptr, k_ptr, v_ptr, a_ptr, b_ptr, u_ptr, o_ptr, kept_ptr, u_own_ptr, o_own_ptr, T, H,
                  N: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Leaves K in the place of k and B in that of b."""
    c, h, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    start = batch * T + c * L
    count = T - c * L  # tokens from the start of this chunk on
    at = start * C + i[:, None] * C + h * N + n[None, :]
    mask = (i < count)[:, None] & (n < N)[None, :]
    k = tl.load(k_ptr + at, mask=mask, other=0.0)  # [L, N], decayed as the tokens go by
    b = tl.load(b_ptr + at, mask=mask, other=0.0)
    v = tl.load(v_ptr + at, mask=mask, other=0.0)
    kept = tl.full((N,), 1.0, tl.float32)
    a_kept = tl.zeros((L, N), tl.float32)  # a and r as they see the state before the chunk
    r_kept = tl.zeros((L, N), tl.float32)
    a_k = tl.zeros((L, L), tl.float32)  # [of token, from token]
    r_k = tl.zeros((L, L), tl.float32)
    r_b = tl.zeros((L, L), tl.float32)
    solved = tl.where(i[:, None] == i[None, :], 1.0, 0.0)  # (1 - a_b)^-1, a row at a time
    for t in range(L):
        row = (start + t) * C + h * N + n
        live = n < tl.where(t < count, N, 0)
        a_t = tl.load(a_ptr + row, mask=live, other=0.0)
        r_t = tl.load(r_ptr + row, mask=live, other=0.0).to(tl.float32)
        w_t = tl.load(w_ptr + row, mask=live, other=1.0)
        here, before = (i == t)[:, None], i < t
        a_kept = tl.where(here, (a_t * kept)[None, :], a_kept)
        a_k = tl.where(here, tl.where(before, tl.sum(k * a_t[None, :], 1), 0.0)[None, :], a_k)
        a_b = tl.where(before, tl.sum(b * a_t[None, :], 1), 0.0)
        solved = tl.where(here, solved + tl.sum(a_b[:, None] * solved, 0)[None, :], solved)
        kept *= w_t
        k = tl.where(before[:, None], k * w_t[None, :], k)
        b = tl.where(before[:, None], b * w_t[None, :], b)
        r_kept = tl.where(here, (r_t * kept)[None, :], r_kept)
        r_k = tl.where(here, tl.where(i <= t, tl.sum(k * r_t[None, :], 1), 0.0)[None, :], r_k)
        r_b = tl.where(here, tl.where(i <= t, tl.sum(b * r_t[None, :], 1), 0.0)[None, :], r_b)
    u_own = tl.dot(solved, tl.dot(a_k, v, input_precision="tf32x3"), input_precision="tf32x3")
    u = tl.dot(solved, a_kept, input_precision="tf32x3")
    o_own = tl.dot(r_k, v, input_precision="tf32x3") + tl.dot(r_b, u_own, input_precision="tf32x3")
    tl.store(k_ptr + at, k, mask=mask)
    tl.store(b_ptr + at, b, mask=mask)
    tl.store(u_ptr + at, u, mask=mask)
    tl.store(o_ptr + at, r_kept + tl.dot(r_b, u, input_precision="tf32x3"), mask=mask)
    tl.store(kept_ptr + ((batch * tl.num_programs(0) + c) * H + h) * N + n, kept)
    tl.store(u_own_ptr + at, u_own, mask=mask)
    tl.store(o_own_ptr + at, o_own, mask=mask)


@triton.jit(do_not_specialize=["T", "slots"])
def spans_kernel(u_ptr, k_ptr, b_ptr, v_ptr, kept_ptr, u_own_ptr, factors_ptr, added_ptr, T, slots, H,
                 N: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A whole span makes of S: P S + Q. Both into the slots of the next span: P [N, N] of factors, Q of added."""
    c, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks: tl.constexpr = 2 * N // COLS
    h, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    own = block * COLS >= N  # the first half of the programs starts from 1 and adds nothing
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    cols = (block * COLS) % N + tl.arange(0, COLS)
    s = tl.where((n[:, None] == cols[None, :]) & (block * COLS < N), 1.0, 0.0)  # [N, COLS]
    adds = cols < tl.where(own, N, 0)
    chunks = tl.cdiv(T, L)
    for step in range(STEPS):
        chunk = c * STEPS + step
        row = (batch * T + chunk * L + i) * C + h * N
        wide, tall, here = row[:, None] + n[None, :], row[None, :] + n[:, None], row[:, None] + cols[None, :]
        u = tl.load(u_own_ptr + here, mask=adds[None, :], other=0.0)
        u += tl.dot(tl.load(u_ptr + wide), s, input_precision="tf32x3")
        k, b = tl.load(k_ptr + tall), tl.load(b_ptr + tall)  # [N, L]
        v = tl.load(v_ptr + here, mask=adds[None, :], other=0.0)
        kept = tl.load(kept_ptr + ((batch * chunks + chunk) * H + h) * N + n)
        s = s * kept[:, None] + tl.dot(k, v, input_precision="tf32x3") + tl.dot(b, u, input_precision="tf32x3")
    to_ptr = added_ptr if own else factors_ptr
    tl.store(to_ptr + ((batch * slots + c + 1) * H + h) * N * N + n[:, None] * N + cols[None, :], s)


@triton.jit(do_not_specialize=["slots"])
def carry_kernel(kv_ptr, factors_ptr, states_ptr, slots, H, N: tl.constexpr, COLS: tl.constexpr):
    """What each span adds becomes the state that the next one starts from."""
    batch, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    n = tl.arange(0, N)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at, square = n[:, None] * N + cols[None, :], n[:, None] * N + n[None, :]
    s = tl.load(kv_ptr + (batch * H + h) * N * N + at).to(tl.float32)  # [N, COLS]
    first = (batch * slots * H + h) * N * N
    tl.store(states_ptr + first + at, s)
    for c in range(1, slots):
        slot = first + c * H * N * N
        factor = tl.load(factors_ptr + slot + square)
        s = tl.load(states_ptr + slot + at) + tl.dot(factor, s, input_precision="tf32x3")
        tl.store(states_ptr + slot + at, s)


@triton.jit(do_not_specialize=["T", "slots"])
def through_kernel(u_ptr, o_ptr, k_ptr, b_ptr, v_ptr, kept_ptr, u_own_ptr, states_ptr, kv_ptr, out_ptr, T, slots, H,
                   N: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A span from the state it starts from, a chunk at a time. The last span leaves its end in kv."""
    c, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks: tl.constexpr = N // COLS
    h, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    C = H * N
    i = tl.arange(0, L)
    n = tl.arange(0, N)
    cols = block * COLS + tl.arange(0, COLS)
    at = n[:, None] * N + cols[None, :]
    # With one span it starts from kv itself, which may be kept in 16 bits.
    s = tl.load(states_ptr + ((batch * slots + c) * H + h) * N * N + at).to(tl.float32)  # [N, COLS]
    chunks = tl.cdiv(T, L)
    for chunk in range(c * STEPS, tl.minimum((c + 1) * STEPS, chunks)):
        live = chunk * L + i < T
        row = (batch * T + chunk * L + i) * C + h * N
        wide, tall, own = row[:, None] + n[None, :], row[None, :] + n[:, None], row[:, None] + cols[None, :]
        u = tl.load(u_own_ptr + own, mask=live[:, None], other=0.0)
        u += tl.dot(tl.load(u_ptr + wide, mask=live[:, None], other=0.0), s, input_precision="tf32x3")
        out = tl.load(out_ptr + own, mask=live[:, None], other=0.0)
        out += tl.dot(tl.load(o_ptr + wide, mask=live[:, None], other=0.0), s, input_precision="tf32x3")
        tl.store(out_ptr + own, out, mask=live[:, None])
        k = tl.load(k_ptr + tall, mask=live[None, :], other=0.0)  # [N, L]
        b = tl.load(b_ptr + tall, mask=live[None, :], other=0.0)
        v = tl.load(v_ptr + own, mask=live[:, None], other=0.0)
        kept = tl.load(kept_ptr + ((batch * chunks + chunk) * H + h) * N + n)
        s = s * kept[:, None] + tl.dot(k, v, input_precision="tf32x3") + tl.dot(b, u, input_precision="tf32x3")
    if c == slots - 1:
        store_state(kv_ptr + (batch * H + h) * N * N + at, s)


def wkv_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, kv: Tensor, tuning: Tuning) -> Tensor:
    """r, w, k, v, a, b [M, C], all but r float32; kv float32 [B, H, K, V], updated in place -> float32 [M, C].

    k and b are written over. The rows of kv are contiguous: one layer of a state, or of a view of its rows.
    """
    M = len(w)
    B, H, N, _ = kv.shape
    T, L, steps = M // B, tuning.chunk, tuning.span // tuning.chunk
    u, o, u_own, out = (torch.empty_like(w) for _ in range(4))
    chunks, slots = triton.cdiv(T, L), triton.cdiv(T, tuning.span)
    kept = w.new_empty(B, chunks, H, N)
    within_kernel[chunks, H, B](r, w, k, v, a, b, u, o, kept, u_own, out, T, H, N, L)
    cols = min(tuning.state_cols, N)
    states = kv  # what each span starts from
    if slots > 1:
        factors, states = w.new_empty(2, B, slots, H, N, N)
        grid = slots - 1, H * 2 * N // cols, B
        spans_kernel[grid](u, k, b, v, kept, u_own, factors, states, T, slots, H, N, L, steps, cols)
        carry_kernel[B * H, N // 16](kv, factors, states, slots, H, N, 16)
    grid = slots, H * N // cols, B
    through_kernel[grid](u, o, k, b, v, kept, u_own, states, kv, out, T, slots, H, N, L, steps, cols)
    return out

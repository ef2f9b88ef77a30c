"""Many tokens through RWKV-7's WKV (a generalised delta rule), all spans of a prompt at once.

    S <- (diag(w_t) + b_t a_t^T) S + k_t v_t^T        o_t = r_t^T S

With u_t = a_t^T S_{t-1} all that a span makes of the state S_0 before it is linear in S_0 (the UT transform of the
delta rule: Yang et al., arXiv:2406.06484). With P_t = w_1 ... w_t from the span's start

    u = X (a P_{t-1} S_0 + A_k v)    o = r P_t S_0 + R_k v + R_b u    S_L = P_L (S_0 + (k / P_j)^T v + (b / P_j)^T u)

where X is the inverse of 1 - A_b, and A_k, A_b, R_k, R_b [L, L] hold what a token's a or r sees of the k and b of the
tokens before it, the decays between them included. Carrying the state from span to span is then one product and one
sum; all else is done for all spans at once. Decays may be divided by, since those of RWKV-7 are bounded, w >= 2^-0.875:
what 128 tokens keep is no less than 2^-112, and float32 and bfloat16 hold both that and its inverse.

X is made of the inverses X of both halves of a block, for blocks of 2, 4, 8 ... tokens: with A the part of A_b that is
between the halves it is X + X A X. Unlike powers of A_b, which lose digits where keys repeat, inverses are harmless.
Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, sigmoid, store, store_state, tokens_there, wait_for_earlier
from rwkv_backends.kernels.sizes import cdiv
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.wkv7 import LOG2_LEAST, Heads

PRECISION = tl.constexpr("tf32x3")
"""Of products of float32: that of float32, in three products of parts."""


@triton.jit
def joined(x, a, i, HALF: tl.constexpr):
    """From the inverses of the halves of blocks to those of the blocks."""
    of, to = i[:, None], i[None, :]
    between = (of // HALF == to // HALF + 1) & (of & HALF > 0)
    half = x.to(a.dtype)
    inner = tl.dot(tl.where(between, a, 0.0).to(a.dtype), half, input_precision=PRECISION).to(a.dtype)
    return tl.dot(half, inner, x, input_precision=PRECISION)


@triton.jit
def inverse(a, i, DOUBLINGS: tl.constexpr):
    """(1 - a)^-1 for a [L, L] of which what is on or above the diagonal means nothing."""
    of, to = i[:, None], i[None, :]
    x = tl.where(of == to, 1.0, tl.where((of == to + 1) & (of & 1 > 0), a.to(tl.float32), 0.0))
    for doubling in tl.static_range(1, DOUBLINGS):
        x = joined(x, a, i, 1 << doubling)
    return x


@triton.jit
def mixed_values(v_ptr, raw_ptr, mix_ptr, first_ptr, values_ptr, base, own, channel, live):
    """Left in `values_ptr` as well, but in the first layer."""
    v = tl.load(v_ptr + own, mask=live, other=0.0)
    if mix_ptr is not None:
        raw = tl.load(raw_ptr + own, mask=live, other=0.0).to(tl.float32)
        share = sigmoid(raw + tl.load(mix_ptr + channel)[None, :])
        first = tl.load(first_ptr + base + own, mask=live, other=0.0).to(tl.float32)
        v = (v.to(tl.float32) + (first - v.to(tl.float32)) * share).to(v.dtype)
        tl.store(values_ptr + base + own, v, mask=live)
    return v


@triton.jit(do_not_specialize=["M", "T", "slots"])
def spans_kernel(rkv_ptr, raw_ptr, decay_ptr, rate_ptr, mix_ptr, removal_ptr, replacement_ptr, bonus_ptr, first_ptr,
                 values_ptr, bonuses_ptr, seeing_ptr, own_ptr, factors_ptr, added_ptr, kept_ptr, length_ptr, M, T,
                 slots, H, N: tl.constexpr, L: tl.constexpr, DOUBLINGS: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """What a span makes of any state: outputs `seeing` S + `own`, and the state kept S + `factors` S + `added`."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    OPERAND: tl.constexpr = seeing_ptr.dtype.element_ty
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, L), tl.arange(0, N)
    channel = h * N + n
    start = b * T + c * L
    there = i < tokens_there(length_ptr, T) - c * L
    live = there[:, None]
    base, part = start * (H * N) + h * N, tl.cast(M, tl.int64) * (H * N)
    own = i[:, None] * (H * N) + n[None, :]
    rkv_ptr += base
    raw_ptr += base
    a_ptr = raw_ptr if mix_ptr is None else raw_ptr + part
    raw = tl.load(a_ptr + part + own, mask=live, other=0.0).to(tl.float32)  # [L, N]
    log_w = sigmoid(raw + tl.load(decay_ptr + channel)[None, :]) * LOG2_LEAST
    log_w = tl.where(live, log_w, 0.0).to(OPERAND)
    # log2 P_t
    until = tl.dot(tl.where(i[None, :] <= i[:, None], 1.0, 0.0).to(OPERAND), log_w, input_precision=PRECISION)
    slot = (b * slots + c) * H + h
    tl.store(kept_ptr + slot * N + n, tl.exp2(tl.sum(log_w.to(tl.float32), 0)))
    raw = tl.load(a_ptr + own, mask=live, other=0.0).to(tl.float32)
    rate = sigmoid(raw + tl.load(rate_ptr + channel)[None, :])
    k = tl.load(rkv_ptr + part + own, mask=live, other=0.0).to(tl.float32)
    kappa = k * tl.load(removal_ptr + channel)[None, :]
    kappa *= tl.rsqrt(tl.maximum(tl.sum(kappa * kappa, 1), 1e-24))[:, None]
    a = (kappa * -tl.exp2(until - log_w.to(tl.float32))).to(OPERAND)
    given = (kappa * rate * tl.exp2(-until)).to(OPERAND)  # b
    k *= 1.0 + (rate - 1.0) * tl.load(replacement_ptr + channel)[None, :]
    k = (k * tl.exp2(-until)).to(OPERAND)
    r = tl.load(rkv_ptr + own, mask=live, other=0.0).to(tl.float32)
    r = (r * tl.exp2(until)).to(OPERAND)
    extra = tl.sum(r.to(tl.float32) * k.to(tl.float32) * tl.load(bonus_ptr + channel)[None, :], 1)
    tl.store(bonuses_ptr + (start + i) * H + h, extra, mask=there)

    x = inverse(tl.dot(a, tl.trans(given), input_precision=PRECISION).to(OPERAND), i, DOUBLINGS).to(OPERAND)
    u = tl.dot(x, a, input_precision=PRECISION).to(OPERAND)
    of, to = i[:, None], i[None, :]
    v = mixed_values(rkv_ptr + 2 * part, raw_ptr, mix_ptr, first_ptr, values_ptr, base, own, channel, live).to(OPERAND)
    seen = tl.where(to < of, tl.dot(a, tl.trans(k), input_precision=PRECISION), 0.0).to(OPERAND)
    u_own = tl.dot(seen, v, input_precision=PRECISION).to(OPERAND)
    u_own = tl.dot(x, u_own, input_precision=PRECISION).to(OPERAND)
    seen = tl.where(to <= of, tl.dot(r, tl.trans(given), input_precision=PRECISION), 0.0).to(OPERAND)  # of u
    store(seeing_ptr + base + own, tl.dot(seen, u, r.to(tl.float32), input_precision=PRECISION), live)
    out = tl.dot(seen, u_own, input_precision=PRECISION)
    seen = tl.where(to <= of, tl.dot(r, tl.trans(k), input_precision=PRECISION), 0.0).to(OPERAND)
    store(own_ptr + base + own, tl.dot(seen, v, out, input_precision=PRECISION), live)

    tl.debug_barrier()
    kept = tl.load(kept_ptr + slot * N + n)
    at = slot * N * N + n[:, None] * N + n[None, :]
    given = tl.trans(given)  # [N, L]
    tl.store(factors_ptr + at, (kept[:, None] * tl.dot(given, u, input_precision=PRECISION)).to(OPERAND))
    added = tl.dot(given, u_own, input_precision=PRECISION)
    tl.store(added_ptr + at, kept[:, None] * tl.dot(tl.trans(k), v, added, input_precision=PRECISION))


@triton.jit(do_not_specialize=["slots"])
def carry_kernel(kv_ptr, kept_ptr, factors_ptr, added_ptr, starts_ptr, slots, H, N: tl.constexpr, COLS: tl.constexpr,
                 STAGES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The state that each span starts from, some columns of one state."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    OPERAND: tl.constexpr = starts_ptr.dtype.element_ty
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    n = tl.arange(0, N)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at, square = n[:, None] * N + cols[None, :], n[:, None] * N + n[None, :]
    own = kv_ptr + (b * H + h) * N * N + at
    s = tl.load(own).to(tl.float32)  # [N, COLS]
    first = b * slots * H + h
    for c in tl.range(slots, num_stages=STAGES):
        slot = first + c * H
        factor = tl.load(factors_ptr + slot * N * N + square)
        added = tl.load(added_ptr + slot * N * N + at)
        kept = tl.load(kept_ptr + slot * N + n)
        start = s.to(OPERAND)
        tl.store(starts_ptr + slot * N * N + at, start)
        s = tl.dot(factor, start, s * kept[:, None] + added, input_precision=PRECISION)
    store_state(own, s)


@triton.jit(do_not_specialize=["T", "slots"])
def outputs_kernel(seeing_ptr, own_ptr, starts_ptr, values_ptr, gate_ptr, bonuses_ptr, weight_ptr, bias_ptr, out_ptr,
                   length_ptr, T, slots, H, N: tl.constexpr, L: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A span from the state it starts from: group norm, bonus and gate after it."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, L), tl.arange(0, N)
    channel = h * N + n
    start = b * T + c * L
    there = i < tokens_there(length_ptr, T) - c * L
    live = there[:, None]
    own = start * (H * N) + i[:, None] * (H * N) + channel[None, :]
    seeing = tl.load(seeing_ptr + own, mask=live, other=0.0)  # [L, N]
    s = tl.load(starts_ptr + ((b * slots + c) * H + h) * N * N + n[:, None] * N + n[None, :])  # [K, V]
    o = tl.load(own_ptr + own, mask=live, other=0.0).to(tl.float32)
    v = tl.load(values_ptr + own, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + own, mask=live, other=0.0).to(tl.float32)
    bonus = tl.load(bonuses_ptr + (start + i) * H + h, mask=there, other=0.0)
    o = tl.dot(seeing, s, o, input_precision=PRECISION)
    apart = o - (tl.sum(o, 1) / N)[:, None]
    y = apart * tl.rsqrt(tl.sum(apart * apart, 1) / N + 64e-5)[:, None]
    y = y * tl.load(weight_ptr + channel)[None, :] + tl.load(bias_ptr + channel)[None, :]
    store(out_ptr + own, (y + bonus[:, None] * v) * gate, live)


def wkv(
    rkv: Tensor,
    raw: Tensor,
    heads: Heads,
    first: Tensor | None,
    kv: Tensor,
    like: Tensor,
    tuning: Tuning,
    length: Tensor | None = None,
) -> Tensor:
    """`wkv7.rows` of T tokens each: rkv [3, M, C], raw [n, M, C], first [M, C], kv [B, H, K, V] -> [M, C].

    `length`: see `Padded`. The first kernel follows two streams.
    """
    _, M, C = rkv.shape
    B, H, N, _ = kv.shape
    halves = rkv.dtype == torch.bfloat16  # float16 does not reach as far as the decays
    operand = torch.bfloat16 if halves else torch.float32
    # What a program holds of a token takes twice the registers in float32, and twice again in three parts.
    held = (1 if halves else 4) * max(1, N // 64)
    T, L, warps = M // B, max(16, tuning.span // held), 4 if N <= 64 else 8
    slots = cdiv(T, L)
    values = rkv[2] if first is None else torch.empty_like(first)
    bonuses, kept = kv.new_empty(M, H, dtype=torch.float32), kv.new_empty(B, slots, H, N, dtype=torch.float32)
    seeing, own = (torch.empty_like(rkv[0], dtype=operand) for _ in range(2))
    factors, starts = (kv.new_empty(B, slots, H, N, N, dtype=operand) for _ in range(2))
    added = torch.empty_like(factors, dtype=torch.float32)
    spans_kernel[slots, H, B](
        rkv, raw, *heads[:6], first, values, bonuses, seeing, own, factors, added, kept, length, M, T, slots, H, N, L,
        L.bit_length() - 1, num_warps=warps, **tuning.alone.launch,
    )  # fmt: skip
    stages = 4 if N <= 64 else 2  # as shared memory has room
    carry_kernel[B * H, N // 16](
        kv, kept, factors, added, starts, slots, H, N, 16, stages, num_warps=warps, **tuning.launch,
    )  # fmt: skip
    out = like.new_empty(M, C)
    outputs_kernel[slots, H, B](
        seeing, own, starts, values, raw[-1], bonuses, *heads[6:], out, length, T, slots, H, N, L, num_warps=warps,
        **tuning.launch,
    )  # fmt: skip
    return out

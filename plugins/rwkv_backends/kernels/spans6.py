"""Many tokens through RWKV-6's WKV, all spans of a prompt at once, in matrix products as large as a span.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(w_t) S + k_t^T v_t

Carrying the state from span to span is one product and one sum an entry; all else is done for all spans at once. What
token t of a span sees of an earlier token j, r_t (w_{j+1} ... w_{t-1}) k_j^T, is parted where it becomes a matrix
product: in the middle of the smallest aligned block of 2, 4, 8 ... tokens that holds both (tokens 5 and 6 are in the
block from 4 to 7, whose middle is before 6). With the decays between it and that middle taken into each r of a second
half and each k of a first, one product of the span with itself has all pairs that are parted by blocks of that size.
Decays are added as logarithms, which are never positive, and never
subtracted: nothing overflows and nothing cancels, however strong they are. Sums of logarithms are matrix products too,
with numbers 0 and 1. "tf32x3" keeps the precision of float32 on tensor cores, in three products of parts.
Annotations are real types, not strings: Triton reads them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import sigmoid, store, store_state, tanh
from rwkv_backends.kernels.tuning import Tuning

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_decays(low_ptr, w_ptr, decay_ptr, i, n, live, D: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """log2 w [SPAN, N] of one head, where it is less than that of any float32 -150; past the end of the prompt 0."""
    rank = tl.arange(0, RANK)
    low = tl.load(low_ptr + i[:, None] * D + rank[None, :], mask=live & (rank < D)[None, :], other=0.0)
    w = tl.load(w_ptr + n[None, :] * D + rank[:, None], mask=(rank < D)[:, None], other=0.0)
    raw = tl.dot(tanh(low.to(tl.float32)).to(w.dtype), w, input_precision=PRECISION)
    raw += tl.load(decay_ptr + n)[None, :]
    return tl.where(live, tl.maximum(tl.exp2(raw * LOG2_E) * -LOG2_E, -150.0), 0.0)


@triton.jit
def decays_of(between_ptr, log_w, i, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """The decays of all tokens j that are between token i and some other place, multiplied: [SPAN, N]."""
    between = tl.load(between_ptr + i[:, None] * SPAN + i[None, :])
    return tl.exp2(tl.dot(between, log_w, input_precision=PRECISION))


@triton.jit(do_not_specialize=["M", "T", "slots"])
def added_kernel(kvrg_ptr, low_ptr, w_ptr, decay_ptr, between_ptr, states_ptr, kept_ptr, M, T, slots, H,
                 D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, HALVINGS: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """What a whole span adds to the state, and the share of the state that it keeps."""
    OPERAND: tl.constexpr = between_ptr.dtype.element_ty
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, SPAN), tl.arange(0, N)
    start = b * T + c * SPAN
    live = (i < T - c * SPAN)[:, None]
    k_ptr = kvrg_ptr + start * (H * N) + h * N
    own = i[:, None] * (H * N) + n[None, :]
    k = tl.load(k_ptr + own, mask=live, other=0.0)  # [SPAN, N]
    v = tl.load(k_ptr + tl.cast(M, tl.int64) * (H * N) + own, mask=live, other=0.0)
    log_w = log_decays(low_ptr + start * D, w_ptr + h * N * D, decay_ptr + h * N, i, n, live, D, RANK, PRECISION)
    slot = (b * slots + c) * H + h
    tl.store(kept_ptr + slot * N + n, tl.exp2(tl.sum(log_w, 0)))
    after = decays_of(between_ptr + (HALVINGS + 1) * SPAN * SPAN, log_w.to(OPERAND), i, SPAN, PRECISION)
    left = (k.to(tl.float32) * after).to(OPERAND)
    added = tl.dot(tl.trans(left), v.to(OPERAND), input_precision=PRECISION)
    tl.store(states_ptr + slot * N * N + n[:, None] * N + n[None, :], added)


@triton.jit(do_not_specialize=["slots"])
def carry_kernel(kv_ptr, kept_ptr, states_ptr, slots, H, N: tl.constexpr, BLOCK: tl.constexpr):
    """What each span adds gives place to the state that it starts from, all entries of all states at once."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(kv_ptr + (b * H + h) * N * N + at).to(tl.float32)
    first = b * slots * H + h
    for c in tl.range(0, slots, num_stages=8):
        slot = first + c * H
        kept, added = tl.load(kept_ptr + slot * N + at // N), tl.load(states_ptr + slot * N * N + at)
        tl.store(states_ptr + slot * N * N + at, s)
        s = s * kept + added
    store_state(kv_ptr + (b * H + h) * N * N + at, s)


@triton.jit(do_not_specialize=["M", "T", "slots"])
def outputs_kernel(kvrg_ptr, low_ptr, w_ptr, decay_ptr, between_ptr, u_ptr, weight_ptr, bias_ptr, states_ptr, out_ptr,
                   M, T, slots, H, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
                   HALVINGS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A span from the state it starts from."""
    OPERAND: tl.constexpr = between_ptr.dtype.element_ty
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, SPAN), tl.arange(0, N)
    start = b * T + c * SPAN
    live = (i < T - c * SPAN)[:, None]
    k_ptr, part = kvrg_ptr + start * (H * N) + h * N, tl.cast(M, tl.int64) * (H * N)
    own = i[:, None] * (H * N) + n[None, :]
    log_w = log_decays(low_ptr + start * D, w_ptr + h * N * D, decay_ptr + h * N, i, n, live, D, RANK, PRECISION)
    log_w = log_w.to(OPERAND)
    of, to = i[:, None], i[None, :]  # what token `of` sees of token `to`
    scores = tl.zeros((SPAN, SPAN), tl.float32)
    for halving in tl.range(0, HALVINGS, num_stages=1):
        half = (SPAN // 2) >> halving
        second = (of & half) > 0
        x = tl.load(k_ptr + tl.where(second, 2 * part, 0) + own, mask=live, other=0.0)  # r there, k in first halves
        decay = decays_of(between_ptr + halving * SPAN * SPAN, log_w, i, SPAN, PRECISION)
        x = (x.to(tl.float32) * decay).to(OPERAND)
        seen = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        scores = tl.where(to >= (of & (-2 * half)), seen, scores)  # in the same block; later tokens do not matter yet
    k = tl.load(k_ptr + own, mask=live, other=0.0).to(tl.float32)  # [SPAN, N]
    r = tl.load(k_ptr + 2 * part + own, mask=live, other=0.0)
    v = tl.load(k_ptr + part + own, mask=live, other=0.0)
    bonus = tl.sum(r.to(tl.float32) * tl.load(u_ptr + h * N + n)[None, :] * k, 1)
    scores = tl.where(to < of, scores, tl.where(to == of, bonus[:, None], 0.0))
    o = tl.dot(scores.to(OPERAND), v.to(OPERAND), input_precision=PRECISION)
    before = decays_of(between_ptr + HALVINGS * SPAN * SPAN, log_w, i, SPAN, PRECISION)
    s = tl.load(states_ptr + ((b * slots + c) * H + h) * N * N + n[:, None] * N + n[None, :])  # [K, V]
    o = tl.dot((r.to(tl.float32) * before).to(OPERAND), s.to(OPERAND), o, input_precision=PRECISION)
    apart = o - (tl.sum(o, 1) / N)[:, None]
    normed = apart * tl.rsqrt(tl.sum(apart * apart, 1) / N + 64e-5)[:, None]
    g = tl.load(k_ptr + 3 * part + own, mask=live, other=0.0).to(tl.float32)
    y = normed * tl.load(weight_ptr + h * N + n)[None, :] + tl.load(bias_ptr + h * N + n)[None, :]
    store(out_ptr + start * (H * N) + h * N + own, y * g * sigmoid(g), live)


@cache
def between(span: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What lies between two places of a span, as numbers 0 and 1 [halvings + 2, span, span]: [.., i, j] is 1 where
    token j is between token i and the middle of its block, for blocks of span, span / 2 ... 2; between token i and the
    start of the span; between token i and its end."""
    with torch.inference_mode(False):
        i = torch.arange(span, device=device)
        before, after = i[None, :] < i[:, None], i[None, :] > i[:, None]
        tables = []
        for half in (span >> n for n in range(1, span.bit_length())):
            together = (i // half)[:, None] == (i // half)[None, :]
            tables.append(together & torch.where((i & half > 0)[:, None], before, after))
        return torch.stack([*tables, before, after]).to(dtype)


def wkv(
    kvrg: Tensor,
    low: Tensor,
    w: Tensor,
    decay: Tensor,
    u: Tensor,
    norm: tuple[Tensor, Tensor],
    kv: Tensor,
    like: Tensor,
    tuning: Tuning,
) -> Tensor:
    """kvrg [4, M, C]; decay exp(-exp(decay + W tanh(low))), low [M, D], w [C, D], decay [C]; u and both of norm [H, N].

    Returns LN_head(o) silu(g) [M, C], of the dtype of `like`. kv [B, H, K, V], float32 or float16, is updated in
    place; its rows are contiguous: one layer of a state, or of a view of its rows.
    """
    _, M, C = kvrg.shape
    B, H, N, _ = kv.shape
    T, D, span = M // B, w.shape[1], max(16, tuning.span * 2 // kvrg.element_size())
    slots = triton.cdiv(T, span)
    # Inputs of 16 bits have no more digits than one pass through the tensor cores keeps.
    precision = "tf32x3" if kvrg.dtype == torch.float32 else "tf32"
    table = between(span, torch.bfloat16 if kvrg.dtype == torch.bfloat16 else torch.float32, kvrg.device)
    sizes = {"D": D, "RANK": max(16, triton.next_power_of_2(D)), "N": N, "SPAN": span, "HALVINGS": len(table) - 2}
    warps = max(1, min(8, span * N * kvrg.element_size() // 2048))
    options = {"PRECISION": precision, "num_warps": warps}
    states, kept = u.new_empty(B, slots, H, N, N), u.new_empty(B, slots, H, N)  # float32, however kv is kept
    added_kernel[slots, H, B](kvrg, low, w, decay, table, states, kept, M, T, slots, H, **sizes, **options)
    block = min(N * N, 256)
    carry_kernel[B * H, N * N // block](kv, kept, states, slots, H, N, block, num_warps=2)
    out = like.new_empty(M, C)
    args = kvrg, low, w, decay, table, u, *norm, states, out, M, T, slots, H
    registers = 168 if kvrg.element_size() == 2 and N <= 64 else None  # three programs share a multiprocessor
    outputs_kernel[slots, H, B](*args, **sizes, **options, maxnreg=registers)
    return out

"""Many tokens through RWKV-6's WKV, all spans of a prompt at once, in matrix products as large as a span.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(w_t) S + k_t^T v_t

Carrying the state from span to span is one product and one sum an entry; all else is done for all spans at once. What
token t of a span sees of an earlier token j, r_t (w_{j+1} ... w_{t-1}) k_j^T, is parted where it becomes a matrix
product: in the middle of an aligned block of 2, 4, 8 ... tokens that holds both (tokens 5 and 6 are in the block from 4
to 7, whose middle is before 6). With the decays between it and that middle taken into each r of a second half and each
k of a first, one product of the span with itself has all pairs that such a middle parts. Pairs of one half are in it as
well if the decays are divided out of each k of a second half and each r of a first: as long as these are far from
overflowing. So a span is halved only until the decays of half a block are weak enough for that.

Decays are added as logarithms, which are never positive; what is divided by is the sum of those that are multiplied
with, so that of a pair's product nothing cancels but whole powers of two. Sums of logarithms are matrix products too,
with numbers 0 and 1. "tf32x3" keeps the precision of float32 on tensor cores, in three products of parts.
Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import (
    let_next_begin,
    sigmoid,
    store,
    store_state,
    tanh,
    tokens_there,
    wait_for_earlier,
)
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

LOG2_E = tl.constexpr(1.4426950408889634)
REGISTERS = 168
"""Of a thread of the largest kernel, in 16 bits: three programs share a multiprocessor."""


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
def sums(between_ptr, log_w, i, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """Of the logarithms of all tokens j that are between token i and some other place: [SPAN, N]."""
    return tl.dot(tl.load(between_ptr + i[:, None] * SPAN + i[None, :]), log_w, input_precision=PRECISION)


@triton.jit
def decays_of(between_ptr, log_w, i, SPAN: tl.constexpr, PRECISION: tl.constexpr):
    """The decays of the same tokens, multiplied."""
    return tl.exp2(sums(between_ptr, log_w, i, SPAN, PRECISION))


@triton.jit
def halvings_needed(between_ptr, log_w, i, LEAST: tl.constexpr, SPAN: tl.constexpr, HALVINGS: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """How often a span is halved until no decay from a token to the middle of its block is too strong to divide by."""
    n = 0
    least = tl.min(sums(between_ptr, log_w, i, SPAN, PRECISION))
    while (n < HALVINGS - 1) & (least < -LEAST):  # in blocks of two nothing is between the tokens and their middle
        n += 1
        least = tl.min(sums(between_ptr + n * SPAN * SPAN, log_w, i, SPAN, PRECISION))
    return n


@triton.jit
def scores_of(r, k, r_ptr, k_ptr, own, live, between_ptr, log_w, i, LEAST: tl.constexpr, SPAN: tl.constexpr,
              HALVINGS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What token i sees of all tokens [SPAN, SPAN]; of pairs with a later one it means nothing."""
    of, to = i[:, None], i[None, :]
    scores = tl.zeros((SPAN, SPAN), log_w.dtype)
    halvings = halvings_needed(between_ptr, log_w, i, LEAST, SPAN, HALVINGS, PRECISION)
    for halving in tl.range(0, halvings, num_stages=1):
        half = (SPAN // 2) >> halving
        second = (of & half) > 0
        x = tl.load(tl.where(second, r_ptr, k_ptr) + own, mask=live, other=0.0)
        decay = decays_of(between_ptr + halving * SPAN * SPAN, log_w, i, SPAN, PRECISION)
        x = (x.to(tl.float32) * decay).to(log_w.dtype)
        seen = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        scores = tl.where(to >= (of & (-2 * half)), seen.to(log_w.dtype), scores)  # in the same block
    half = (SPAN // 2) >> halvings
    second = (of & half) > 0
    reach = sums(between_ptr + halvings * SPAN * SPAN, log_w, i, SPAN, PRECISION)
    # Of a pair in one half, one is decayed too far and the other grown back. What overflows belongs to no pair.
    back = -(reach + log_w.to(tl.float32))
    shown = (k.to(tl.float32) * tl.exp2(tl.where(second, back, reach))).to(log_w.dtype)
    seeing = (r.to(tl.float32) * tl.exp2(tl.where(second, reach, back))).to(log_w.dtype)
    seen = tl.dot(seeing, tl.trans(shown), input_precision=PRECISION)
    return tl.where(to >= (of & (-2 * half)), seen.to(log_w.dtype), scores)


@triton.jit(do_not_specialize=["M", "T", "slots"])
def added_kernel(kvrg_ptr, low_ptr, w_ptr, decay_ptr, between_ptr, added_ptr, kept_ptr, logs_ptr, length_ptr, M, T,
                 slots, H, D: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
                 HALVINGS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """What a whole span adds to the state, and the share of the state that it keeps."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    OPERAND: tl.constexpr = between_ptr.dtype.element_ty
    c, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, SPAN), tl.arange(0, N)
    start = b * T + c * SPAN
    live = (i < tokens_there(length_ptr, T) - c * SPAN)[:, None]
    k_ptr = kvrg_ptr + start * (H * N) + h * N
    own = i[:, None] * (H * N) + n[None, :]
    k = tl.load(k_ptr + own, mask=live, other=0.0)  # [SPAN, N]
    v = tl.load(k_ptr + tl.cast(M, tl.int64) * (H * N) + own, mask=live, other=0.0)
    log_w = log_decays(low_ptr + start * D, w_ptr + h * N * D, decay_ptr + h * N, i, n, live, D, RANK, PRECISION)
    store(logs_ptr + start * (H * N) + h * N + own, log_w, live)
    slot = (b * slots + c) * H + h
    tl.store(kept_ptr + slot * N + n, tl.exp2(tl.sum(log_w, 0)))
    after = decays_of(between_ptr + (HALVINGS + 1) * SPAN * SPAN, log_w.to(OPERAND), i, SPAN, PRECISION)
    left = (k.to(tl.float32) * after).to(OPERAND)
    added = tl.dot(tl.trans(left), v.to(OPERAND), input_precision=PRECISION)
    tl.store(added_ptr + slot * N * N + n[:, None] * N + n[None, :], added)


@triton.jit(do_not_specialize=["slots"])
def carry_kernel(kv_ptr, kept_ptr, added_ptr, starts_ptr, slots, H, N: tl.constexpr, ROWS: tl.constexpr,
                 AHEAD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The state that each span starts from, some rows of one state: what AHEAD spans add is asked for at once."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * N + tl.arange(0, N)[None, :]
    own = kv_ptr + (b * H + h) * N * N + at
    s = tl.load(own).to(tl.float32)
    first = b * slots * H + h
    for c in range(0, slots, AHEAD):
        kept = ()
        added = ()
        for j in tl.static_range(AHEAD):
            slot, there = first + (c + j) * H, c + j < slots  # past the end the state stays
            kept = kept + (tl.load(kept_ptr + slot * N + rows, mask=rows < tl.where(there, N, 0), other=1.0),)
            added = added + (tl.load(added_ptr + slot * N * N + at, mask=at < tl.where(there, N * N, 0), other=0.0),)
        for j in tl.static_range(AHEAD):
            slot, there = first + (c + j) * H, c + j < slots
            store(starts_ptr + slot * N * N + at, s, at < tl.where(there, N * N, 0))
            s = s * kept[j][:, None] + added[j]
    store_state(own, s)


@triton.jit(do_not_specialize=["M", "T", "slots"])
def outputs_kernel(kvrg_ptr, between_ptr, logs_ptr, u_ptr, weight_ptr, bias_ptr, starts_ptr, out_ptr, length_ptr, M, T,
                   slots, H, LEAST: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, HALVINGS: tl.constexpr,
                   PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A span from the state it starts from."""
    let_next_begin(OVERLAP)
    wait_for_earlier(OVERLAP)
    OPERAND: tl.constexpr = between_ptr.dtype.element_ty
    c, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h = H - 1 - tl.program_id(1)  # the last heads have the strongest decays, as models are trained: the longest first
    i, n = tl.arange(0, SPAN), tl.arange(0, N)
    start = b * T + c * SPAN
    live = (i < tokens_there(length_ptr, T) - c * SPAN)[:, None]
    k_ptr, part = kvrg_ptr + start * (H * N) + h * N, tl.cast(M, tl.int64) * (H * N)
    own = i[:, None] * (H * N) + n[None, :]
    log_w = tl.load(logs_ptr + start * (H * N) + h * N + own, mask=live, other=0.0)
    # All that is read is asked for before anything is waited for, as far as there are registers.
    EARLY: tl.constexpr = kvrg_ptr.dtype.element_ty.primitive_bitwidth == 16
    k = tl.load(k_ptr + own, mask=live, other=0.0)  # [SPAN, N]
    r = tl.load(k_ptr + 2 * part + own, mask=live, other=0.0)
    v_at, s_at = k_ptr + part + own, starts_ptr + ((b * slots + c) * H + h) * N * N + n[:, None] * N + n[None, :]
    if EARLY:
        v, s = tl.load(v_at, mask=live, other=0.0), tl.load(s_at)  # s [K, V]
    scores = scores_of(
        r, k, k_ptr + 2 * part, k_ptr, own, live, between_ptr, log_w, i, LEAST, SPAN, HALVINGS, PRECISION
    )
    of, to = i[:, None], i[None, :]
    bonus = tl.sum(r.to(tl.float32) * tl.load(u_ptr + h * N + n)[None, :] * k.to(tl.float32), 1)
    scores = tl.where(to < of, scores, tl.where(to == of, bonus[:, None], 0.0).to(OPERAND))
    if not EARLY:
        v, s = tl.load(v_at, mask=live, other=0.0), tl.load(s_at)
    o = tl.dot(scores, v.to(OPERAND), input_precision=PRECISION)
    before = decays_of(between_ptr + HALVINGS * SPAN * SPAN, log_w, i, SPAN, PRECISION)
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
    start of the span; between token i and its end.

    Made on the host: a GPU would load a kernel for each of these steps first."""
    with torch.inference_mode(False):
        i = torch.arange(span)
        before, after = i[None, :] < i[:, None], i[None, :] > i[:, None]
        tables = []
        for half in (span >> n for n in range(1, span.bit_length())):
            together = (i // half)[:, None] == (i // half)[None, :]
            tables.append(together & torch.where((i & half > 0)[:, None], before, after))
        return torch.stack([*tables, before, after]).to(device, dtype)


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
    length: Tensor | None = None,
) -> Tensor:
    """kvrg [4, M, C]; decay exp(-exp(decay + W tanh(low))), low [M, D], w [C, D], decay [C]; u and both of norm [H, N].

    Returns LN_head(o) silu(g) [M, C], of the dtype of `like`. kv [B, H, K, V], float32 or float16, is updated in
    place; its rows are contiguous: one layer of a state, or of a view of its rows. `length`: see `Padded`.
    """
    _, M, C = kvrg.shape
    B, H, N, _ = kv.shape
    T, D, span = M // B, w.shape[1], max(16, tuning.span * 2 // kvrg.element_size())
    slots = cdiv(T, span)
    # Inputs of 16 bits have no more digits than one pass through the tensor cores keeps.
    precision = "tf32x3" if kvrg.dtype == torch.float32 else "tf32"
    table = between(span, torch.bfloat16 if kvrg.dtype == torch.bfloat16 else torch.float32, kvrg.device)
    warps = max(1, min(8, span * N * kvrg.element_size() ** 2 // 4096))
    sizes = {"N": N, "SPAN": span, "HALVINGS": len(table) - 2, "PRECISION": precision, "num_warps": warps}
    added, kept = u.new_empty(B, slots, H, N, N), u.new_empty(B, slots, H, N)  # float32, however kv is kept
    logs = torch.empty_like(kvrg[0], dtype=table.dtype)
    rank = max(16, next_power_of_2(D))
    added_kernel[slots, H, B](
        kvrg, low, w, decay, table, added, kept, logs, length, M, T, slots, H, D, rank, **sizes, **tuning.launch
    )
    starts = torch.empty_like(added, dtype=table.dtype)  # as the tensor cores take them
    rows = min(N, max(1, 256 // N))
    carry_kernel[B * H, N // rows](
        kv, kept, added, starts, slots, H, N, rows, tuning.carry_ahead,
        num_warps=max(1, rows * N // 128), **tuning.launch,
    )  # fmt: skip
    out = like.new_empty(M, C)
    outputs_kernel[slots, H, B](
        kvrg, table, logs, u, *norm, starts, out, length, M, T, slots, H, tuning.least_decay,
        **sizes, **tuning.launch, maxnreg=REGISTERS if table.element_size() == 2 and N <= 64 else None,
    )  # fmt: skip
    return out

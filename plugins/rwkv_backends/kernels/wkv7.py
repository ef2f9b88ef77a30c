"""One token through RWKV-7's WKV, a head at a time: what the adapters give, the state, group norm, bonus and gate.

Annotations are real types, not strings: Triton reads them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.adapters7 import Adapters
from rwkv_backends.kernels.device import (
    let_next_begin,
    load_vector,
    sigmoid,
    store,
    store_state,
    tanh,
    wait_for_earlier,
)
from rwkv_backends.kernels.sizes import next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

LOG2_LEAST = tl.constexpr(-0.8750387749145276)
"""Of the strongest decay, exp(-exp(-1/2))."""


class Heads(NamedTuple):
    """Weights of a layer by head, float32 [H, N] or [C]."""

    decay: Tensor
    rate: Tensor
    value_mix: Tensor | None  # None in the first layer
    removal: Tensor
    replacement: Tensor
    bonus: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


@triton.jit
def decay_of(raw):
    return tl.exp2(sigmoid(raw) * LOG2_LEAST)


@triton.jit
def plus2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def plus4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def token(s, r, k, v, decay, rate, removal, replacement, bonus, weight, bias, N: tl.constexpr):
    """The state [K, V] after a token, and what the gate is given [V]."""
    kappa = k * removal
    k *= 1.0 + (rate - 1.0) * replacement
    # r_t^T S_t = (r w)^T S + (r . b) seen + (r . k) v: all that is summed up, is before the state has changed.
    seen, kept = tl.reduce((s * kappa[:, None], s * (r * decay)[:, None]), 0, plus2)
    rk = r * k
    size, removed, own, extra = tl.reduce((kappa * kappa, r * kappa * rate, rk, rk * bonus), 0, plus4)
    size = tl.maximum(size, 1e-24)
    o = kept - removed / size * seen + own * v
    s = s * decay[:, None] - (kappa * rate / size)[:, None] * seen[None, :] + k[:, None] * v[None, :]
    apart = o - tl.sum(o, 0) / N
    y = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5) * weight + bias
    return s, y + extra * v


@triton.jit
def load_up(up_ptr, own, STRIDE, R, RANK: tl.constexpr):
    """Rows `own` of [C, STRIDE], of which the first R columns are not zero."""
    rank = tl.arange(0, RANK)
    return tl.load(up_ptr + own[:, None] * STRIDE + rank[None, :], mask=(rank < R)[None, :], other=0.0)


@triton.jit
def adapted(up, low):
    """[N, R] times low [R]."""
    return tl.sum(up.to(tl.float32) * low[None, :], 1)


@triton.jit
def load_low(low_ptr, R, RANK: tl.constexpr):
    rank = tl.arange(0, RANK)
    return load_vector(low_ptr, rank, rank < R)


@triton.jit
def few_kernel(rkv_ptr, low_ptr, up_ptr, decay_ptr, rate_ptr, mix_ptr, removal_ptr, replacement_ptr, bonus_ptr,
               weight_ptr, bias_ptr, first_ptr, kv_ptr, normed_ptr, prev_ptr, out_ptr, B, H, RV, RA, RW, RG, STRIDE,
               N: tl.constexpr, VR: tl.constexpr, AR: tl.constexpr, WR: tl.constexpr, GR: tl.constexpr,
               OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, N)
    own = h * N + n
    row = b * H * N + own
    part = B * H * N
    at = kv_ptr + (b.to(tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
    s = tl.load(at).to(tl.float32)  # [K, V]
    side = H * N * STRIDE  # of one adapter's matrix
    a_ptr = up_ptr if mix_ptr is None else up_ptr + side
    a_up, w_up = load_up(a_ptr, own, STRIDE, RA, AR), load_up(a_ptr + side, own, STRIDE, RW, WR)
    wait_for_earlier(OVERLAP)
    low_at = low_ptr + b * (STRIDE * (3 if mix_ptr is None else 4))
    a_low = low_at if mix_ptr is None else low_at + STRIDE
    rate = sigmoid(tl.load(rate_ptr + own) + adapted(a_up, load_low(a_low, RA, AR)))
    decay = decay_of(tl.load(decay_ptr + own) + adapted(w_up, tanh(load_low(a_low + STRIDE, RW, WR))))
    rank = tl.arange(0, GR)
    low = tl.where(rank < RG, sigmoid(load_low(a_low + 2 * STRIDE, RG, GR)), 0.0)
    gate = adapted(load_up(a_ptr + 2 * side, own, STRIDE, RG, GR), low)
    r = tl.load(rkv_ptr + row).to(tl.float32)
    k = tl.load(rkv_ptr + part + row).to(tl.float32)
    v = tl.load(rkv_ptr + 2 * part + row).to(tl.float32)
    if mix_ptr is not None:
        mix = adapted(load_up(up_ptr, own, STRIDE, RV, VR), load_low(low_at, RV, VR))
        v += (tl.load(first_ptr + row).to(tl.float32) - v) * sigmoid(tl.load(mix_ptr + own) + mix)
    s, y = token(
        s, r, k, v, decay, rate, tl.load(removal_ptr + own), tl.load(replacement_ptr + own),
        tl.load(bonus_ptr + own), tl.load(weight_ptr + own), tl.load(bias_ptr + own), N,
    )  # fmt: skip
    store_state(at, s)
    store(out_ptr + row, y * gate, n < N)
    tl.store(prev_ptr + row, tl.load(normed_ptr + row))


@triton.jit(do_not_specialize=["B"])
def rows_kernel(rkv_ptr, raw_ptr, decay_ptr, rate_ptr, mix_ptr, removal_ptr, replacement_ptr, bonus_ptr, weight_ptr,
                bias_ptr, first_ptr, kv_ptr, out_ptr, B, H, N: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.arange(0, N)
    own = h * N + n
    row = b * (H * N) + own
    part = tl.cast(B, tl.int64) * (H * N)
    at = kv_ptr + (b * H + h) * N * N + n[:, None] * N + n[None, :]
    s = tl.load(at).to(tl.float32)  # [K, V]
    wait_for_earlier(OVERLAP)
    v = tl.load(rkv_ptr + 2 * part + row).to(tl.float32)
    a_ptr = raw_ptr
    if mix_ptr is not None:
        a_ptr += part
        share = sigmoid(tl.load(mix_ptr + own) + tl.load(raw_ptr + row).to(tl.float32))
        v += (tl.load(first_ptr + row).to(tl.float32) - v) * share
    rate = sigmoid(tl.load(rate_ptr + own) + tl.load(a_ptr + row).to(tl.float32))
    decay = decay_of(tl.load(decay_ptr + own) + tl.load(a_ptr + part + row).to(tl.float32))
    gate = tl.load(a_ptr + 2 * part + row).to(tl.float32)
    r, k = tl.load(rkv_ptr + row).to(tl.float32), tl.load(rkv_ptr + part + row).to(tl.float32)
    s, y = token(
        s, r, k, v, decay, rate, tl.load(removal_ptr + own), tl.load(replacement_ptr + own),
        tl.load(bonus_ptr + own), tl.load(weight_ptr + own), tl.load(bias_ptr + own), N,
    )  # fmt: skip
    store_state(at, s)
    store(out_ptr + row, y * gate, n < N)


def few(
    rkv: Tensor, low: Tensor, adapters: Adapters, heads: Heads, first: Tensor | None, kv: Tensor,
    normed: Tensor, prev: Tensor, tuning: Tuning,
) -> Tensor:  # fmt: skip
    """One token of few rows: rkv [3, B, C], low [B, n R], the first layer's values [B, C]; prev = normed [B, C].

    Returns what the output matrix is given [B, C], of the dtype of `normed`. kv [B, H, K, V], float32 or float16, is
    updated in place; its rows are contiguous: one layer of a state, or of a view of its rows.
    """
    B = rkv.shape[1]
    H, N = heads.bonus.shape
    out = torch.empty_like(normed)
    wide = [next_power_of_2(max(1, rank)) for rank in adapters.ranks]
    few_kernel[H, B](
        rkv, low, adapters.up, *heads, first, kv, normed, prev, out, B, H, *adapters.ranks, adapters.up.shape[2],
        N, *wide, num_warps=8, **tuning.launch,
    )  # fmt: skip
    return out


def rows(
    rkv: Tensor, raw: Tensor, heads: Heads, first: Tensor | None, kv: Tensor, like: Tensor, tuning: Tuning
) -> Tensor:
    """`few` of any number of rows, whose adapters' products are raw [n, B, C]; the result is of the dtype of `like`."""
    _, B, C = rkv.shape
    H, N = heads.bonus.shape
    out = like.new_empty(B, C)
    # With so few warps each thread has a channel of its own: what is made of the channels is not made twice.
    warps = max(1, N * N // 2048)
    rows_kernel[H, B](rkv, raw, *heads, first, kv, out, B, H, N, num_warps=warps, **tuning.launch)
    return out

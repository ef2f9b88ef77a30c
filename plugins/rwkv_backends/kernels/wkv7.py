"""What surrounds RWKV-7's WKV, a head at a time: its inputs, one token of it, and norm, bonus and gate after it.

Annotations are real types, not strings: Triton reads them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, store, store_state, tanh, wait_for_earlier
from rwkv_backends.kernels.tuning import Tuning


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
    return tl.exp(-0.6065306597126334 * tl.sigmoid(raw))  # exp(-1/2)


@triton.jit
def load_up(up_ptr, own, R, RANK: tl.constexpr):
    """Rows `own` of [C, R]."""
    rank = tl.arange(0, RANK)
    return tl.load(up_ptr + own[:, None] * R + rank[None, :], mask=(rank < R)[None, :], other=0.0)


@triton.jit
def adapted(up, low):
    """[N, R] times low [R]."""
    return tl.sum(up.to(tl.float32) * low[None, :], 1)


@triton.jit
def load_low(low_ptr, R, RANK: tl.constexpr):
    rank = tl.arange(0, RANK)
    return load_vector(low_ptr, rank, rank < R)


@triton.jit
def step_kernel(rkv_ptr, low_ptr, w_ptr, a_ptr, v_ptr, g_ptr, decay_ptr, rate_ptr, mix_ptr, removal_ptr,
                replacement_ptr, bonus_ptr, weight_ptr, bias_ptr, first_ptr, kv_ptr, normed_ptr, prev_ptr, out_ptr,
                B, H, RW, RA, RV, RG, A_AT, V_AT, G_AT, LOW, N: tl.constexpr, WR: tl.constexpr, AR: tl.constexpr,
                VR: tl.constexpr, GR: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, N)
    own = h * N + n
    row = b * H * N + own
    part = B * H * N
    at = kv_ptr + (b.to(tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
    s = tl.load(at).to(tl.float32)  # [K, V]
    w_up, a_up = load_up(w_ptr, own, RW, WR), load_up(a_ptr, own, RA, AR)
    wait_for_earlier(OVERLAP)
    low_at = low_ptr + b * LOW
    raw = tl.load(decay_ptr + own) + adapted(w_up, tanh(load_low(low_at, RW, WR)))
    decay = decay_of(raw)
    rate = tl.sigmoid(tl.load(rate_ptr + own) + adapted(a_up, load_low(low_at + A_AT, RA, AR)))
    rank = tl.arange(0, GR)
    low = tl.where(rank < RG, tl.sigmoid(load_low(low_at + G_AT, RG, GR)), 0.0)
    gate = adapted(load_up(g_ptr, own, RG, GR), low)
    r = tl.load(rkv_ptr + row).to(tl.float32)
    k = tl.load(rkv_ptr + part + row).to(tl.float32)
    v = tl.load(rkv_ptr + 2 * part + row).to(tl.float32)
    if mix_ptr is None:
        tl.store(first_ptr + row, v)
    else:
        mix = adapted(load_up(v_ptr, own, RV, VR), load_low(low_at + V_AT, RV, VR))
        share = tl.sigmoid(tl.load(mix_ptr + own) + mix)
        v += (tl.load(first_ptr + row) - v) * share
    kappa = k * tl.load(removal_ptr + own)
    kappa = kappa / tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 0)), 1e-12)
    k *= 1.0 + (rate - 1.0) * tl.load(replacement_ptr + own)
    seen = tl.sum(s * -kappa[:, None], 0)
    s = s * decay[:, None] + (kappa * rate)[:, None] * seen[None, :] + k[:, None] * v[None, :]
    store_state(at, s)
    o = tl.sum(s * r[:, None], 0)
    apart = o - tl.sum(o, 0) / N
    y = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5) * tl.load(weight_ptr + own) + tl.load(bias_ptr + own)
    y += tl.sum(r * k * tl.load(bonus_ptr + own), 0) * v
    store(out_ptr + row, y * gate, n < N)
    if prev_ptr is not None:
        tl.store(prev_ptr + row, tl.load(normed_ptr + row))


@triton.jit
def prepare_kernel(k_ptr, v_ptr, w_raw_ptr, a_raw_ptr, v_raw_ptr, decay_ptr, rate_ptr, mix_ptr, removal_ptr,
                   replacement_ptr, first_ptr, w_out, k_out, v_out, a_out, b_out, H, N: tl.constexpr,
                   HEADS: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    n = tl.arange(0, N)
    own = h[:, None] * N + n[None, :]
    mask = (h < H)[:, None] & (n < N)[None, :]
    at = m * H * N + own
    k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(w_raw_ptr + at, mask=mask, other=0.0).to(tl.float32)
    decay = decay_of(tl.load(decay_ptr + own, mask=mask, other=0.0) + raw)
    raw = tl.load(a_raw_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rate = tl.sigmoid(tl.load(rate_ptr + own, mask=mask, other=0.0) + raw)
    if mix_ptr is None:
        tl.store(first_ptr + at, v, mask=mask)
    else:
        raw = tl.load(v_raw_ptr + at, mask=mask, other=0.0).to(tl.float32)
        share = tl.sigmoid(tl.load(mix_ptr + own, mask=mask, other=0.0) + raw)
        v += (tl.load(first_ptr + at, mask=mask, other=0.0) - v) * share
    kappa = k * tl.load(removal_ptr + own, mask=mask, other=0.0)
    kappa = kappa / tl.maximum(tl.sqrt(tl.sum(kappa * kappa, 1)), 1e-12)[:, None]
    k *= 1.0 + (rate - 1.0) * tl.load(replacement_ptr + own, mask=mask, other=0.0)
    tl.store(w_out + at, decay, mask=mask)
    tl.store(k_out + at, k, mask=mask)
    tl.store(v_out + at, v, mask=mask)
    tl.store(a_out + at, -kappa, mask=mask)
    tl.store(b_out + at, kappa * rate, mask=mask)


@triton.jit
def finish_kernel(o_ptr, r_ptr, k_ptr, v_ptr, gate_ptr, bonus_ptr, weight_ptr, bias_ptr, out_ptr, H, N: tl.constexpr,
                  HEADS: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    n = tl.arange(0, N)
    own = h[:, None] * N + n[None, :]
    mask = (h < H)[:, None] & (n < N)[None, :]
    at = m * H * N + own
    o = tl.load(o_ptr + at, mask=mask, other=0.0)
    r = tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at, mask=mask, other=0.0)
    v = tl.load(v_ptr + at, mask=mask, other=0.0)
    apart = o - (tl.sum(o, 1) / N)[:, None]
    y = apart * tl.rsqrt(tl.sum(apart * apart, 1) / N + 64e-5)[:, None]
    y = y * tl.load(weight_ptr + own, mask=mask, other=0.0) + tl.load(bias_ptr + own, mask=mask, other=0.0)
    y += tl.sum(r * k * tl.load(bonus_ptr + own, mask=mask, other=0.0), 1)[:, None] * v
    store(out_ptr + at, y * tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32), mask)


class Ups(NamedTuple):
    """The second halves of the adapters, [C, R], and where the first halves' results lie in a row of `low`."""

    decay: Tensor
    rate: Tensor
    value: Tensor | None  # None in the first layer
    gate: Tensor
    places: tuple[int, int, int]  # of rate, value, gate


def step(
    rkv: Tensor, low: Tensor, ups: Ups, heads: Heads, first: Tensor, kv: Tensor, like: Tensor, tuning: Tuning,
    shifted: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:  # fmt: skip
    """One token: rkv [3, B, C], low [B, *], first float32 [B, C] (the first layer's values: written there, read after).

    Returns what the output matrix is given [B, C], of the dtype of `like`. kv float32 [B, H, K, V] is updated in
    place; its rows are contiguous. `shifted` is (LN(x), prev) where prev is to become the former.
    """
    _, B, C = rkv.shape
    _, H, N, _ = kv.shape
    out = like.new_empty(B, C)
    ranks = [0 if up is None else up.shape[1] for up in ups[:4]]
    wide = [triton.next_power_of_2(max(1, rank)) for rank in ranks]
    step_kernel[H, B](
        rkv, low, *ups[:4], *heads, first, kv, *shifted, out, B, H, *ranks, *ups.places, low.shape[1], N, *wide,
        num_warps=8, **tuning.launch,
    )  # fmt: skip
    return out


def prepare(
    k: Tensor, v: Tensor, raw: tuple[Tensor, Tensor, Tensor | None], heads: Heads, first: Tensor
) -> list[Tensor]:
    """k, v and what the adapters of decay, rate and value give [M, C] -> w, k, v, a, b, float32 [M, C]."""
    M, C = k.shape
    H, N = heads.bonus.shape
    outs = [first.new_empty(M, C) for _ in range(5)]
    wide = triton.next_power_of_2(H)
    warps = max(1, min(8, wide * N // 512))
    prepare_kernel[M,](k, v, *raw, *heads[:5], first, *outs, H, N, wide, num_warps=warps)
    return outs


def finish(o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, heads: Heads) -> Tensor:
    """(LN_head(o) + (r . k bonus) v) gate [M, C], of the dtype of gate."""
    M = len(o)
    H, N = heads.bonus.shape
    out = torch.empty_like(gate)
    wide = triton.next_power_of_2(H)
    warps = max(1, min(8, wide * N // 512))
    finish_kernel[M,](o, r, k, v, gate, *heads[5:], out, H, N, wide, num_warps=warps)
    return out

"""One token of many rows through RWKV-6's WKV, where a step reads the rounded state and few steps write it.

    o = r (diag(exp(w_1 + ... + w_n)) S + sum_j diag(exp(w_j+1 + ... + w_n)) k_j^T v_j + u * k^T v)

S is the state as written (`deferred.py`), for which n updates are waiting: sums of as many rows take the place of a
write. Decays come from a kernel of their own, which may run beside products. Annotations are real types, not strings:
Triton reads them.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.deferred import DECAYS, FILLED, KEYS, SLOT, VALUES, Deferred, DeferredState
from rwkv_backends.kernels.device import let_next_begin, store, store_state, tanh, wait_for_earlier
from rwkv_backends.kernels.sizes import cdiv, next_power_of_2
from rwkv_backends.kernels.tuning import Tuning

ROWS, COLS = 16, 64
"""Of a program that makes decays: as few rows as tensor cores take."""
MERGED_ROWS, REGISTERS = 16, 168
"""Of a program that makes updates: rows, one after another; of a thread, so that three programs share a
multiprocessor."""


@triton.jit
def decays_kernel(low_ptr, w_ptr, decay_ptr, out_ptr, B, C, D, RANK: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """In float32, as the state's own kernel has them: how long a state remembers hangs on their last digits."""
    let_next_begin(OVERLAP)
    rows, cols = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    rank = tl.arange(0, RANK)
    w = tl.load(w_ptr + cols[None, :] * D + rank[:, None], mask=(cols < C)[None, :] & (rank < D)[:, None], other=0.0)
    base = tl.load(decay_ptr + cols, mask=cols < C, other=0.0)
    wait_for_earlier(OVERLAP)
    live = (rows < B)[:, None]
    low = tl.load(low_ptr + rows[:, None] * D + rank[None, :], mask=live & (rank < D)[None, :], other=0.0)
    raw = tl.dot(tanh(low.to(tl.float32)), w.to(tl.float32), input_precision="tf32x3") + base[None, :]
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], -tl.exp(raw), mask=live & (cols < C)[None, :])


def decays(low: Tensor, w: Tensor, decay: Tensor, out: Tensor, tuning: Tuning) -> Tensor:
    """low [B, D], w [C, D], decay [C] -> out, float32 [B, C]: -exp(decay + W tanh(low)), logarithms of decays."""
    (B, C), D = out.shape, w.shape[1]
    rank = max(16, next_power_of_2(D))
    decays_kernel[cdiv(C, COLS), cdiv(B, ROWS)](low, w, decay, out, B, C, D, rank, ROWS, COLS, **tuning.launch)
    return out


@triton.jit
def merge_kernel(kv_ptr, rounded_ptr, filled_ptr, slot_ptr, k_ptr, v_ptr, w_ptr, KV_LAYER, SLOTS_LAYER, FILLED_LAYER,
                 B, H, N: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of ROWS rows of a layer, of those that have no room, or have just come and are not rounded. A program
    that has none ends after one load."""
    let_next_begin(OVERLAP)
    h, first, layer = tl.program_id(0), tl.program_id(1) * ROWS, tl.program_id(2).to(tl.int64)
    n, rows = tl.arange(0, N), first + tl.arange(0, ROWS)
    filled_ptr += layer * FILLED_LAYER
    wait_for_earlier(OVERLAP)
    slot = tl.load(filled_ptr + rows, mask=rows < B, other=1) % ROOM
    if h == 0:
        tl.store(slot_ptr + layer * FILLED_LAYER + rows, slot, mask=rows < B)
    if tl.min(slot, 0) == 0:
        for b in range(first, tl.minimum(first + ROWS, B)):
            if tl.load(filled_ptr + b) % ROOM == 0:
                tile = layer * KV_LAYER + (tl.cast(b, tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
                s = tl.load(kv_ptr + tile, eviction_policy="evict_first").to(tl.float32)
                slots = layer * SLOTS_LAYER + tl.cast(b, tl.int64) * ROOM * H * N + h * N + n
                left = tl.zeros((N,), tl.float32)
                added = tl.zeros((N, N), tl.float32)
                for i in tl.static_range(ROOM):  # the newest first
                    at = slots + (ROOM - 1 - i) * H * N
                    k = tl.load(k_ptr + at).to(tl.float32) * tl.exp(left)
                    added += k[:, None] * tl.load(v_ptr + at).to(tl.float32)[None, :]
                    left += tl.load(w_ptr + at)
                s = s * tl.exp(left)[:, None] + added
                store_state(kv_ptr + tile, s)
                if rounded_ptr is not None:
                    store_state(rounded_ptr + tile, s)


def merge(state: DeferredState, tuning: Tuning) -> None:
    """Makes the updates of all rows that have no room for another, and gives each row its slot for the next token."""
    kv, k, filled = state["att_kv"], state[KEYS], state[FILLED]
    L, B, H, _, N = kv.shape
    merge_kernel[H, cdiv(B, MERGED_ROWS), L](
        kv, state.rounded, filled, state[SLOT], k, state[VALUES], state[DECAYS], kv.stride(0), k.stride(0),
        filled.stride(0), B, H, N, k.shape[2], MERGED_ROWS,
        num_warps=4 if N <= 64 else 16, maxnreg=REGISTERS if N <= 64 else None, **tuning.launch,
    )  # fmt: skip


@triton.jit
def deferred_kernel(kvrg_ptr, decays_ptr, u_ptr, weight_ptr, bias_ptr, out_ptr, filled_ptr, slot_ptr, k_ptr, v_ptr,
                    w_ptr, rounded_ptr, B, H, N: tl.constexpr, ROOM: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of one row, by one warp where it can hold them: no sum waits for another warp's."""
    let_next_begin(OVERLAP)
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, N)
    own, part = h * N + n, B * H * N
    u, weight, bias = tl.load(u_ptr + own), tl.load(weight_ptr + own), tl.load(bias_ptr + own)
    wait_for_earlier(OVERLAP)
    tile = (b.to(tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
    s = tl.load(rounded_ptr + tile, eviction_policy="evict_first")  # [K, V]
    row, slots = b * H * N + own, b.to(tl.int64) * ROOM * H * N + own
    k, v = tl.load(kvrg_ptr + row), tl.load(kvrg_ptr + part + row)
    r, g = tl.load(kvrg_ptr + 2 * part + row).to(tl.float32), tl.load(kvrg_ptr + 3 * part + row).to(tl.float32)
    slot = tl.load(slot_ptr + b)
    o = tl.sum(r * u * k.to(tl.float32), 0) * v.to(tl.float32)
    seen = r  # by what is there: r exp(the decays since)
    for i in tl.static_range(ROOM - 1):  # the newest first
        at, there = slots + (ROOM - 2 - i) * H * N, n < tl.where(ROOM - 2 - i < slot, N, 0)
        late_k, late_v = tl.load(k_ptr + at, mask=there, other=0.0), tl.load(v_ptr + at, mask=there, other=0.0)
        o += tl.sum(late_k.to(tl.float32) * seen, 0) * late_v.to(tl.float32)
        seen *= tl.exp(tl.load(w_ptr + at, mask=there, other=0.0))
    o += tl.sum(s.to(tl.float32) * seen[:, None], 0)
    store(k_ptr + slots + slot * H * N, k, n < N)
    store(v_ptr + slots + slot * H * N, v, n < N)
    tl.store(w_ptr + slots + slot * H * N, tl.load(decays_ptr + row))
    if h == 0:
        tl.store(filled_ptr + b, slot + 1)
    apart = o - tl.sum(o, 0) / N
    normed = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5)
    store(out_ptr + row, (normed * weight + bias) * g * tl.sigmoid(g), n < N)


def wkv(
    kvrg: Tensor,
    decays: Tensor,
    u: Tensor,
    norm: tuple[Tensor, Tensor],
    deferred: Deferred,
    like: Tensor,
    tuning: Tuning,
) -> Tensor:
    """kvrg [4, B, C], decays float32 [B, C], logarithms; u and both of norm [H, N] -> LN_head(o) silu(g) [B, C], of the
    dtype of `like`.

    The token's own update is put into its slot, which `merge` has chosen. All are contiguous: one layer of a state, or
    of a view of its rows.
    """
    _, B, C = kvrg.shape
    H, N = u.shape
    out = like.new_empty(B, C)
    deferred_kernel[H, B](
        kvrg, decays, u, *norm, out, *deferred, B, H, N, deferred.k.shape[1], num_warps=1 if N <= 64 else 4,
        **tuning.launch,
    )  # fmt: skip
    return out

"""One token of many rows through RWKV-6's WKV, where each step reads a state and few write it (`deferred.py`).

    o = r (diag(w) S' + sum_j k_j^T v_j + u * k^T v)        S' the state as written, w and k_j up to the token before

Sums of rows with few numbers take the place of the state's update, until there is no room for another. Decays come from
a kernel of their own, which may run beside products: a program that makes them has no registers left for states on
their way. Annotations are real types, not strings: Triton reads them.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.deferred import Deferred
from rwkv_backends.kernels.device import let_next_begin, store, store_state, tanh, wait_for_earlier
from rwkv_backends.kernels.tuning import Tuning

ROWS, COLS = 16, 64
"""Of a program that makes decays: as few rows as tensor cores take."""


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
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], tl.exp(-tl.exp(raw)), mask=live & (cols < C)[None, :])


def decays(low: Tensor, w: Tensor, decay: Tensor, out: Tensor, tuning: Tuning) -> Tensor:
    """low [B, D], w [C, D], decay [C] -> out, float32 [B, C]: exp(-exp(decay + W tanh(low)))."""
    (B, C), D = out.shape, w.shape[1]
    rank = max(16, triton.next_power_of_2(D))
    decays_kernel[triton.cdiv(C, COLS), triton.cdiv(B, ROWS)](
        low, w, decay, out, B, C, D, rank, ROWS, COLS, **tuning.launch
    )
    return out


@triton.jit
def deferred_kernel(kvrg_ptr, decays_ptr, u_ptr, weight_ptr, bias_ptr, kv_ptr, out_ptr, waiting_ptr, late_k_ptr,
                    late_v_ptr, left_ptr, B, H, N: tl.constexpr, ROOM: tl.constexpr, SLOTS: tl.constexpr,
                    ROWS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of ROWS rows, one after the other: the next row's state is asked for meanwhile."""
    let_next_begin(OVERLAP)
    h, first = tl.program_id(0), tl.program_id(1) * ROWS
    n, j = tl.arange(0, N), tl.arange(0, SLOTS)
    own, part = h * N + n, B * H * N
    u, weight, bias = tl.load(u_ptr + own), tl.load(weight_ptr + own), tl.load(bias_ptr + own)
    wait_for_earlier(OVERLAP)
    for b in tl.range(first, tl.minimum(first + ROWS, B), num_stages=STAGES):
        row = b * H * N + own
        at = kv_ptr + (tl.cast(b, tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
        s = tl.load(at).to(tl.float32)  # [K, V]
        k, v = tl.load(kvrg_ptr + row).to(tl.float32), tl.load(kvrg_ptr + part + row).to(tl.float32)
        r, g = tl.load(kvrg_ptr + 2 * part + row).to(tl.float32), tl.load(kvrg_ptr + 3 * part + row).to(tl.float32)
        w, waiting = tl.load(decays_ptr + row), tl.load(waiting_ptr + b)
        slot = tl.cast(b, tl.int64) * ROOM * H * N + own
        slots, there = slot[None, :] + j[:, None] * H * N, (j < tl.minimum(waiting, ROOM))[:, None]
        late_k = tl.load(late_k_ptr + slots, mask=there, other=0.0)  # [SLOTS, K]
        late_v = tl.load(late_v_ptr + slots, mask=there, other=0.0).to(tl.float32)
        left = tl.load(left_ptr + row, mask=n < tl.where(waiting > 0, N, 0), other=1.0)
        seen = tl.sum(late_k * r[None, :], 1)  # [SLOTS]
        o = tl.sum(s * (r * left)[:, None], 0) + tl.sum(seen[:, None] * late_v, 0) + tl.sum(r * u * k, 0) * v
        if waiting < ROOM:
            tl.store(late_k_ptr + slots, late_k * w[None, :], mask=there)
            tl.store(late_k_ptr + slot + waiting * H * N, k)
            store(late_v_ptr + slot + waiting * H * N, v, n < N)
            tl.store(left_ptr + row, left * w)
        else:
            s = s * (left * w)[:, None] + k[:, None] * v[None, :]
            for i in tl.static_range(ROOM):
                earlier = tl.load(late_k_ptr + slot + i * H * N) * w
                s += earlier[:, None] * tl.load(late_v_ptr + slot + i * H * N).to(tl.float32)[None, :]
            store_state(at, s)
        apart = o - tl.sum(o, 0) / N
        normed = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5)
        store(out_ptr + row, (normed * weight + bias) * g * tl.sigmoid(g), n < N)


def wkv(
    kvrg: Tensor,
    decays: Tensor,
    u: Tensor,
    norm: tuple[Tensor, Tensor],
    kv: Tensor,
    deferred: Deferred,
    like: Tensor,
    tuning: Tuning,
) -> Tensor:
    """kvrg [4, B, C], decays float32 [B, C], u and both of norm [H, N] -> LN_head(o) silu(g) [B, C], of the dtype of
    `like`.

    kv [B, H, K, V], float32 or float16, or what waits for it, is updated in place; how many wait the caller says. All
    are contiguous: one layer of a state, or of a view of its rows.
    """
    _, B, C = kvrg.shape
    H, N = u.shape
    room, out = deferred.k.shape[1], like.new_empty(B, C)
    deferred_kernel[H, triton.cdiv(B, tuning.deferred_together)](
        kvrg, decays, u, *norm, kv, out, *deferred, B, H, N, room, triton.next_power_of_2(room),
        tuning.deferred_together, tuning.deferred_stages, num_warps=tuning.deferred_warps, **tuning.launch,
    )  # fmt: skip
    return out

"""One token through RWKV-6's WKV: decay, state, group norm and gate of a head in one kernel.

Annotations are real types, not strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from rwkv_layers.rwkv6 import TimeMixing
from torch import Tensor

from rwkv_backends.deferred import DeferredState
from rwkv_backends.kernels import deferred6
from rwkv_backends.kernels.device import let_next_begin, load_vector, store, store_state, tanh, wait_for_earlier
from rwkv_backends.kernels.sizes import next_power_of_2
from rwkv_backends.kernels.tuning import Tuning
from rwkv_runtime import State

FEW_WARPS, MANY_WARPS = 8, 4
"""Of a program: of few rows what counts is when the last one is done, of many how much of the state is on its way."""


@triton.jit
def wkv_kernel(kvrg_ptr, low_ptr, w_ptr, decay_ptr, u_ptr, weight_ptr, bias_ptr, kv_ptr, out_ptr, B, D, H,
               N: tl.constexpr, RANK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    let_next_begin(OVERLAP)
    h, b = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, N)
    own = h * N + n
    at = kv_ptr + (b.to(tl.int64) * H + h) * N * N + n[:, None] * N + n[None, :]
    s = tl.load(at).to(tl.float32)  # [K, V]
    rank = tl.arange(0, RANK)
    w = tl.load(w_ptr + own[:, None] * D + rank[None, :], mask=(rank < D)[None, :], other=0.0).to(tl.float32)
    base, u = tl.load(decay_ptr + own), tl.load(u_ptr + own)
    weight, bias = tl.load(weight_ptr + own), tl.load(bias_ptr + own)
    wait_for_earlier(OVERLAP)
    low = tanh(load_vector(low_ptr + b * D, rank, rank < D))
    decay = tl.exp(-tl.exp(base + tl.sum(w * low[None, :], 1)))
    part = B * H * N
    row = b * H * N + own
    k = tl.load(kvrg_ptr + row).to(tl.float32)
    v = tl.load(kvrg_ptr + part + row).to(tl.float32)
    r = tl.load(kvrg_ptr + 2 * part + row).to(tl.float32)
    g = tl.load(kvrg_ptr + 3 * part + row).to(tl.float32)
    o = tl.sum(s * r[:, None], 0) + tl.sum(r * u * k, 0) * v
    store_state(at, s * decay[:, None] + k[:, None] * v[None, :])
    apart = o - tl.sum(o, 0) / N
    normed = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5)
    y = (normed * weight + bias) * g * tl.sigmoid(g)
    store(out_ptr + row, y, n < N)


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
    """kvrg [4, B, C]; decay exp(-exp(decay + W tanh(low))), low [B, D], w [C, D], decay [C]; u and both of norm [H, N].

    Returns LN_head(o) silu(g) [B, C], of the dtype of `like`. kv [B, H, K, V], float32 or float16, is updated in
    place; its rows are contiguous: one layer of a state, or of a view of its rows.
    """
    _, B, C = kvrg.shape
    H, N = u.shape
    D = w.shape[1]
    out = like.new_empty(B, C)
    rank = next_power_of_2(D)
    wkv_kernel[H, B](
        kvrg, low, w, decay, u, *norm, kv, out, B, D, H, N, rank,
        num_warps=FEW_WARPS if tuning.vector_rows >= B else MANY_WARPS, **tuning.launch,
    )  # fmt: skip
    return out


def of_layer(
    kvrg: Tensor,
    low: Tensor,
    att: TimeMixing,
    state: State,
    i: int,
    like: Tensor,
    tuning: Tuning,
    decays: Tensor | None = None,
) -> Tensor:
    """The same for layer i of a model and its state, whose updates may be deferred: of what decays it has by then."""
    norm, kv = (att.ln_x_weight, att.ln_x_bias), state["att_kv"][i]
    if not isinstance(state, DeferredState):
        return wkv(kvrg, low, att.decay_w2, att.decay, att.bonus, norm, kv, like, tuning)
    if decays is None:
        decays = torch.empty(kvrg.shape[1:], device=kvrg.device)
        deferred6.decays(low, att.decay_w2, att.decay, decays, tuning)
    return deferred6.wkv(kvrg, decays, att.bonus, norm, state.layer(i), like, tuning)

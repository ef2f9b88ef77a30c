"""Differentiable RWKV-6 WKV in chunks.

For one head, with per-channel log decays ``lw <= 0``, bonus ``u`` and state ``S`` [N, N] (key by value), the
recurrence is

    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t),    S_t = diag(e^{lw_t}) S_{t-1} + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch").  With the log decays summed inside a chunk, inclusively (G) and
exclusively (G-), a chunk that starts at state S needs only the factors

    A_tj = sum_c r_tc k_jc e^{G-_tc - G_jc} for j < t,    R_t = r_t e^{G-_t},    K_j = k_j e^{G_L - G_j}

and then o = A v + (r . (u k)) v + R S and S' = diag(e^{G_L}) S + K^T v.  The bonus (r . (u k)) goes on the diagonal
of A.  The factors come from plain torch (:mod:`training.factors`) or from kernels (:mod:`training.wkv_kernels`); the
products and the states between chunks are the same for both.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.factors import from_chunks, to_chunks


def wkv_recurrence(r: Tensor, k: Tensor, v: Tensor, lw: Tensor, u: Tensor) -> Tensor:
    """WKV token by token from a zero state: the naive twin of :func:`wkv`.

    Args:
        r, k, v, lw: [B, T, H, N], ``lw`` the logarithm of the decay.
        u: [H, N], the bonus.

    Returns:
        [B, T, H, N].
    """
    batch, length, heads, size = r.shape
    state = r.new_zeros(batch, heads, size, size)  # [B, H, K, V]
    outputs = []
    for t in range(length):
        pair = k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append((r[:, t, :, :, None] * (state + u[:, :, None] * pair)).sum(-2))
        state = lw[:, t].exp()[..., None] * state + pair
    return torch.stack(outputs, dim=1)


def chunk_states(kept: Tensor, added: Tensor) -> Tensor:
    """State before each chunk, S_{n+1} = diag(kept_n) S_n + added_n from S_0 = 0.

    Args:
        kept: [B, n, H, N], e^{G_L}.
        added: [B, n, H, N, N].
    """
    state = torch.zeros_like(added[:, 0])
    states = []
    for n in range(added.shape[1]):
        states.append(state)
        state = kept[:, n, :, :, None] * state + added[:, n]
    return torch.stack(states, dim=1)


def chunk_state_gradients(kept: Tensor, direct: Tensor) -> Tensor:
    """Gradient of the state after each chunk, dS_n = direct_n + diag(kept_n) dS_{n+1}; the last one is 0.

    Args:
        kept: [B, n, H, N].
        direct: [B, n, H, N, N], gradient of the state before each chunk through that chunk's outputs.
    """
    gradient = torch.zeros_like(direct[:, 0])
    gradients = []
    for n in range(direct.shape[1] - 1, -1, -1):
        gradients.append(gradient)
        gradient = kept[:, n, :, :, None] * gradient + direct[:, n]
    gradients.reverse()
    return torch.stack(gradients, dim=1)


def source(kernels: bool) -> ModuleType:
    """Where the factors and their gradients come from; the kernels need Triton."""
    if kernels:
        from training import wkv_kernels

        return wkv_kernels
    from training import factors

    return factors


class ChunkedWKV(torch.autograd.Function):
    """Forward and backward of the chunked form (see the module's text)."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, v: Tensor, lw: Tensor, u: Tensor, chunk: int, kernels: bool) -> Tensor:
        pairs, received, keys, kept = source(kernels).factors(r, k, lw, u, chunk)
        vc = to_chunks(v, chunk)  # [B, n, H, L, N]
        states = chunk_states(kept, keys.mT @ vc)  # [B, n, H, N, N]
        ctx.save_for_backward(r, k, v, lw, u, pairs, received, keys, kept, states)
        ctx.chunk, ctx.kernels = chunk, kernels
        return from_chunks(pairs.mT @ vc + received @ states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, lw, u, pairs, received, keys, kept, states = ctx.saved_tensors
        vc, go = (to_chunks(x, ctx.chunk) for x in (v, gradients[0]))  # [B, n, H, L, N]
        g_states = chunk_state_gradients(kept, received.mT @ go)  # after each chunk: [B, n, H, N, N]
        g_pairs = vc @ go.mT  # [B, n, H, j, t]
        g_received, g_keys = go @ states.mT, vc @ g_states.mT
        g_kept = (g_states * states).sum(-1)
        g_v = from_chunks(pairs @ go + keys @ g_states).to(v.dtype)
        g_factors = (g_pairs, g_received, g_keys, g_kept)
        g_r, g_k, g_lw, g_u = source(ctx.kernels).factor_gradients(r, k, lw, u, *g_factors, ctx.chunk)
        return g_r, g_k, g_v, g_lw, g_u, None, None


def wkv(r: Tensor, k: Tensor, v: Tensor, lw: Tensor, u: Tensor, chunk: int = 16, kernels: bool = False) -> Tensor:
    """WKV of whole sequences from a zero state, differentiable.

    Args:
        r, k, v, lw: [B, T, H, N]; ``lw <= 0`` is the logarithm of the decay.
        u: [H, N], the bonus.
        chunk: tokens handled pairwise; T is padded to a multiple of it.
        kernels: whether Triton makes the factors: in fp32, on a GPU, with chunk and N powers of two.

    Returns:
        [B, T, H, N], fp32 unless the inputs are fp64: a trained model's output here is too large for bf16.
    """
    length = r.shape[1]
    missing = -length % chunk
    if missing:
        r, k, v, lw = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (r, k, v, lw))
    out: Tensor = ChunkedWKV.apply(r, k, v, lw, u, chunk, kernels)  # type: ignore[no-untyped-call]
    return out[:, :length] if missing else out

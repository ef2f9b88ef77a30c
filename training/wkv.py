"""Differentiable RWKV-6 WKV in chunks, in plain torch.

For one head, with per-channel log decays ``lw <= 0``, bonus ``u`` and state ``S`` [N, N] (key by value), the
recurrence is

    o_t = r_t (S_{t-1} + diag(u) k_t^T v_t),    S_t = diag(e^{lw_t}) S_{t-1} + k_t^T v_t

(Peng et al. 2024, "Eagle and Finch").  With the log decays summed inside a chunk, inclusively (G) and
exclusively (G-), a chunk that starts at state S needs only the factors

    A_tj = sum_c r_tc k_jc e^{G-_tc - G_jc} for j < t,    R_t = r_t e^{G-_t},    K_j = k_j e^{G_L - G_j}

and then o = A v + (r . (u k)) v + R S and S' = diag(e^{G_L}) S + K^T v.  No exponent is above 0: factoring A
into (r e^{G-}) (k e^{-G}) would overflow under strong decays, so A is a sum over pairs.  The backward pass is
written out so that the [chunk, chunk, N] tensor of pairs never has to be kept; compiled, each sum over pairs is
one fused reduction that never stores it at all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, N] -> [B, n, H, L, N] in the precision of the state (at least fp32)."""
    batch, length, heads, size = x.shape
    x = x.view(batch, length // chunk, chunk, heads, size).transpose(2, 3)
    return x if x.dtype == torch.float64 else x.float()


def from_chunks(x: Tensor) -> Tensor:
    """[B, n, H, L, N] -> [B, T, H, N]."""
    batch, chunks, heads, chunk, size = x.shape
    return x.transpose(2, 3).reshape(batch, chunks * chunk, heads, size)


def strictly_lower(chunk: int, device: torch.device) -> Tensor:
    """[L, L] mask of j < t."""
    steps = torch.arange(chunk, device=device)
    return steps[:, None] > steps[None, :]


def running_sum(x: Tensor) -> Tensor:
    """Sum over t of [..., L, N], inclusive; as a masked sum over pairs, because Triton 3.6 fails on fused scans."""
    steps = torch.arange(x.shape[-2], device=x.device)
    mask = (steps[:, None] >= steps[None, :])[..., None]  # [t, j, 1]
    return torch.where(mask, x[..., None, :, :], 0.0).sum(-2)


def pair_decay(exclusive: Tensor, inclusive: Tensor, chunk: int) -> Tensor:
    """e^{G-_t - G_j} for j < t, else 0: [B, n, H, t, j, N].

    Masked before the exponential, whose argument is then never above 0.
    """
    exponent = exclusive[..., :, None, :] - inclusive[..., None, :, :]
    mask = strictly_lower(chunk, exclusive.device)[..., None]
    return torch.where(mask, exponent, float("-inf")).exp()


def pair_decay_transposed(exclusive: Tensor, inclusive: Tensor, chunk: int) -> Tensor:
    """The same as [B, n, H, j, t, N].

    An expression of its own, so that a compiler fuses it into the sum over t instead of keeping one tensor of pairs
    for two sums.
    """
    exponent = exclusive[..., None, :, :] - inclusive[..., :, None, :]
    mask = strictly_lower(chunk, exclusive.device).T[..., None]
    return torch.where(mask, exponent, float("-inf")).exp()


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


class ChunkedWKV(torch.autograd.Function):
    """Forward and backward of the chunked form (see the module's text)."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, v: Tensor, lw: Tensor, u: Tensor, chunk: int) -> Tensor:
        rc, kc, vc, lc = (to_chunks(x, chunk) for x in (r, k, v, lw))  # [B, n, H, L, N]
        bonus = u.to(rc.dtype)[:, None]  # [H, 1, N]
        inclusive = running_sum(lc)
        exclusive = inclusive - lc
        last = inclusive[..., -1:, :]
        pairs = (rc[..., :, None, :] * kc[..., None, :, :] * pair_decay(exclusive, inclusive, chunk)).sum(-1)
        states = chunk_states(last.squeeze(-2).exp(), (kc * (last - inclusive).exp()).mT @ vc)
        out = pairs @ vc + (rc * exclusive.exp()) @ states + (rc * bonus * kc).sum(-1, keepdim=True) * vc
        ctx.save_for_backward(r, k, v, lw, u, pairs, states)
        ctx.chunk = chunk
        return from_chunks(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, lw, u, pairs, states = ctx.saved_tensors
        chunk: int = ctx.chunk
        rc, kc, vc, lc, go = (to_chunks(x, chunk) for x in (r, k, v, lw, gradients[0]))  # [B, n, H, L, N]
        bonus = u.to(rc.dtype)[:, None]
        inclusive = running_sum(lc)
        exclusive = inclusive - lc
        last = inclusive[..., -1:, :]
        from_start, to_end = exclusive.exp(), (last - inclusive).exp()
        received, kept_keys = rc * from_start, kc * to_end

        # Through the state: its gradient after each chunk, then the factors R, K and e^{G_L}.
        kept = last.squeeze(-2).exp()  # [B, n, H, N]
        g_states = chunk_state_gradients(kept, received.mT @ go)  # [B, n, H, N, N]
        g_received = go @ states.mT
        g_keys = vc @ g_states.mT
        g_last = kept * (g_states * states).sum(-1) + (g_keys * kept_keys).sum(-2)  # [B, n, H, N]

        # Inside the chunk: e^{G-_t - G_j} gives the exponents' gradients r dr and -k dk for nothing.
        g_pairs = torch.where(strictly_lower(chunk, r.device), go @ vc.mT, 0.0)  # [B, n, H, t, j]
        decay = pair_decay(exclusive, inclusive, chunk)
        g_r = (g_pairs[..., None] * kc[..., None, :, :] * decay).sum(-2) + g_received * from_start
        decay = pair_decay_transposed(exclusive, inclusive, chunk)
        g_k = (g_pairs.mT[..., None] * rc[..., None, :, :] * decay).sum(-2) + g_keys * to_end
        g_exclusive, g_inclusive = rc * g_r, -kc * g_k
        # lw_s adds to G_t for t >= s, to G-_t for t > s and to G_L.
        total = g_exclusive + g_inclusive
        g_lw = total.sum(-2, keepdim=True) - running_sum(total) + g_inclusive + g_last[..., None, :]

        g_bonus = (go * vc).sum(-1, keepdim=True)  # [B, n, H, L, 1]
        g_v = pairs.mT @ go + kept_keys @ g_states + (rc * bonus * kc).sum(-1, keepdim=True) * go
        g_u = (g_bonus * rc * kc).sum((0, 1, 3))
        g_r = g_r + g_bonus * bonus * kc
        g_k = g_k + g_bonus * rc * bonus
        sequences = (from_chunks(g).to(x.dtype) for g, x in ((g_r, r), (g_k, k), (g_v, v), (g_lw, lw)))
        return (*sequences, g_u.to(u.dtype), None)


def wkv(r: Tensor, k: Tensor, v: Tensor, lw: Tensor, u: Tensor, chunk: int = 16) -> Tensor:
    """WKV of whole sequences from a zero state, differentiable.

    Args:
        r, k, v, lw: [B, T, H, N]; ``lw <= 0`` is the logarithm of the decay.
        u: [H, N], the bonus.
        chunk: tokens handled pairwise; T is padded to a multiple of it.

    Returns:
        [B, T, H, N], fp32 unless the inputs are fp64: a trained model's output here is too large for bf16.
    """
    length = r.shape[1]
    missing = -length % chunk
    if missing:
        r, k, v, lw = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (r, k, v, lw))
    out: Tensor = ChunkedWKV.apply(r, k, v, lw, u, chunk)  # type: ignore[no-untyped-call]
    return out[:, :length] if missing else out

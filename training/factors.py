"""The factors of a chunk of WKV and their gradients in plain torch: the twins of the kernels in ``wkv_kernels``.

What a factor is, :mod:`training.wkv` says.  No exponent is above 0: factoring A into (r e^{G-}) (k e^{-G}) would
overflow under strong decays, so A is a sum over pairs.  The gradients are written out so that the [chunk, chunk, N]
tensor of pairs never has to be kept; compiled, each sum over pairs is one fused reduction that never stores it at all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, N] -> [B, n, H, L, N] in the precision of the state (at least fp32)."""
    batch, length, heads, size = x.shape
    x = x.view(batch, length // chunk, chunk, heads, size).transpose(2, 3)
    return x if x.dtype == torch.float64 else x.float()


def from_chunks(x: Tensor) -> Tensor:
    """[B, n, H, L, N] -> [B, T, H, N]."""
    batch, chunks, heads, chunk, size = x.shape
    return x.transpose(2, 3).reshape(batch, chunks * chunk, heads, size)


def later(chunk: int, device: torch.device) -> Tensor:
    """[L, L] mask of t > j at [j, t]."""
    steps = torch.arange(chunk, device=device)
    return steps[None, :] > steps[:, None]


def running_sum(x: Tensor) -> Tensor:
    """Sum over t of [..., L, N], inclusive; as a masked sum over pairs, because Triton 3.6 fails on fused scans."""
    steps = torch.arange(x.shape[-2], device=x.device)
    mask = (steps[:, None] >= steps[None, :])[..., None]  # [t, j, 1]
    return torch.where(mask, x[..., None, :, :], 0.0).sum(-2)


def pair_decay(exclusive: Tensor, inclusive: Tensor) -> Tensor:
    """e^{G-_t - G_j} for t > j, else 0: [B, n, H, j, t, N].

    Masked before the exponential, whose argument is then never above 0.
    """
    exponent = exclusive[..., None, :, :] - inclusive[..., :, None, :]
    mask = later(exclusive.shape[-2], exclusive.device)[..., None]
    return torch.where(mask, exponent, float("-inf")).exp()


def pair_decay_transposed(exclusive: Tensor, inclusive: Tensor) -> Tensor:
    """The same as [B, n, H, t, j, N].

    An expression of its own, so that a compiler fuses it into the sum over j instead of keeping one tensor of pairs
    for two sums.
    """
    exponent = exclusive[..., :, None, :] - inclusive[..., None, :, :]
    mask = later(exclusive.shape[-2], exclusive.device).T[..., None]
    return torch.where(mask, exponent, float("-inf")).exp()


def factors(r: Tensor, k: Tensor, lw: Tensor, u: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk needs besides its values and the state before it.

    Args:
        r, k, lw: [B, n * L, H, N], ``lw <= 0``.
        u: [H, N], the bonus.
        chunk: L.

    Returns:
        A with the bonus on its diagonal, transposed: [B, n, H, j, t]; R and K: [B, n, H, L, N]; e^{G_L}: [B, n, H, N].
    """
    r, k, lw = (to_chunks(x, chunk) for x in (r, k, lw))
    inclusive = running_sum(lw)
    exclusive = inclusive - lw
    last = inclusive[..., -1:, :]
    pairs = (k[..., :, None, :] * r[..., None, :, :] * pair_decay(exclusive, inclusive)).sum(-1)
    bonus = (r * u.to(r.dtype)[:, None] * k).sum(-1)  # [B, n, H, L]
    received, keys = r * exclusive.exp(), k * (last - inclusive).exp()
    return pairs + torch.diag_embed(bonus), received, keys, last.squeeze(-2).exp()


def factor_gradients(
    r: Tensor, k: Tensor, lw: Tensor, u: Tensor,
    g_pairs: Tensor, g_received: Tensor, g_keys: Tensor, g_kept: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r, k, lw and u from those of the four results of :func:`factors`.

    What ``g_pairs`` has for t < j counts for nothing.
    """
    types = [x.dtype for x in (r, k, lw, u)]
    r, k, lw = (to_chunks(x, chunk) for x in (r, k, lw))
    inclusive = running_sum(lw)
    exclusive = inclusive - lw
    last = inclusive[..., -1:, :]
    g_bonus = torch.diagonal(g_pairs, dim1=-2, dim2=-1)[..., None]  # [B, n, H, L, 1]
    g_pairs = torch.where(later(chunk, r.device), g_pairs, 0.0)
    decay = pair_decay_transposed(exclusive, inclusive)
    g_r = (g_pairs.mT[..., None] * k[..., None, :, :] * decay).sum(-2) + g_received * exclusive.exp()
    to_end = (last - inclusive).exp()
    decay = pair_decay(exclusive, inclusive)
    g_k = (g_pairs[..., None] * r[..., None, :, :] * decay).sum(-2) + g_keys * to_end

    # e^{G-_t - G_j} gives the exponents' gradients r dr and -k dk for nothing.
    g_exclusive, g_inclusive = r * g_r, -k * g_k
    g_last = last.squeeze(-2).exp() * g_kept + (g_keys * k * to_end).sum(-2)  # [B, n, H, N]
    # lw_s adds to G_t for t >= s, to G-_t for t > s and to G_L.
    total = g_exclusive + g_inclusive
    g_lw = total.sum(-2, keepdim=True) - running_sum(total) + g_inclusive + g_last[..., None, :]

    bonus = u.to(r.dtype)[:, None]  # [H, 1, N]
    g_u = (g_bonus * r * k).sum((0, 1, 3))
    sequences = (from_chunks(x) for x in (g_r + g_bonus * bonus * k, g_k + g_bonus * r * bonus, g_lw))
    g_r, g_k, g_lw, g_u = (g.to(dtype) for g, dtype in zip((*sequences, g_u), types, strict=True))
    return g_r, g_k, g_lw, g_u

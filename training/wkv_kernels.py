"""The factors of a chunk of WKV and their gradients as two Triton kernels: the fast twins of :mod:`training.factors`.

A program takes a chunk of one head, and the backward one some of its channels.  It goes through the tokens j from the
last to the first, and keeps for each t > j the product of the decays between both: one multiplication by w_j a step
instead of a running sum, a difference and an exponential.  All these factors are at most 1, whatever the decays are.

Both are custom operators: a compiler sees their shapes and nothing of what is inside.  Annotations are real types, not
strings: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32  # of a program of the backward pass: with more its tiles do not fit into the registers


@triton.jit
def factors_kernel(
    r_at, k_at, lw_at, u_at, pairs_at, received_at, keys_at, kept_at, heads, L: tl.constexpr, N: tl.constexpr
):
    program = tl.program_id(0)  # of B * n * H
    t, c = tl.arange(0, L), tl.arange(0, N)
    row = heads * N  # from a token to the next
    first = (program // heads) * L * row + (program % heads) * N
    tokens = first + t[:, None] * row + c[None, :]
    r = tl.load(r_at + tokens).to(tl.float32)
    u = tl.load(u_at + (program % heads) * N + c).to(tl.float32)
    bonus = tl.sum(r * (tl.load(k_at + tokens).to(tl.float32) * u[None, :]), 1)  # [L]
    received = r  # times the decays between j and t
    to_end = tl.full([N], 1.0, tl.float32)  # the decays after j
    for step in range(L):
        j = L - 1 - step
        k = tl.load(k_at + first + j * row + c).to(tl.float32)
        w = tl.exp(tl.load(lw_at + first + j * row + c))
        pair = tl.sum(received * k[None, :], 1)
        pair = tl.where(t > j, pair, tl.where(t == j, bonus, 0.0))
        tl.store(pairs_at + (program * L + j) * L + t, pair)
        tl.store(keys_at + (program * L + j) * N + c, k * to_end)
        received = tl.where(t[:, None] > j, received * w[None, :], received)
        to_end = to_end * w
    tl.store(received_at + (program * L + t[:, None]) * N + c[None, :], received)
    tl.store(kept_at + program * N + c, to_end)


@triton.jit
def gradients_kernel(
    r_at, k_at, lw_at, u_at, g_pairs_at, g_received_at, g_keys_at, g_kept_at,
    g_r_at, g_k_at, g_lw_at, g_u_at, heads, L: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # of B * n * H
    t, c = tl.arange(0, L), tl.program_id(1) * C + tl.arange(0, C)
    row = heads * N
    first = (program // heads) * L * row + (program % heads) * N
    tokens = first + t[:, None] * row + c[None, :]
    r = tl.load(r_at + tokens).to(tl.float32)
    decay = tl.full([L, C], 1.0, tl.float32)  # between j and t
    g_r = tl.zeros([L, C], tl.float32)
    g_k = tl.zeros([L, C], tl.float32)
    to_end = tl.full([C], 1.0, tl.float32)
    g_last = tl.zeros([C], tl.float32)  # of the sum of all the chunk's lw
    for step in range(L):
        j = L - 1 - step
        k = tl.load(k_at + first + j * row + c).to(tl.float32)
        w = tl.exp(tl.load(lw_at + first + j * row + c))
        g_pair = tl.load(g_pairs_at + (program * L + j) * L + t)
        decayed = tl.where(t > j, g_pair, 0.0)[:, None] * decay
        g_r += decayed * k[None, :]
        g_key = tl.load(g_keys_at + (program * L + j) * N + c) * to_end
        g_last += k * g_key
        g_k = tl.where(t[:, None] == j, (tl.sum(decayed * r, 0) + g_key)[None, :], g_k)
        decay = tl.where(t[:, None] > j, decay * w[None, :], decay)
        to_end = to_end * w
    g_r += tl.load(g_received_at + (program * L + t[:, None]) * N + c[None, :]) * decay
    g_last += to_end * tl.load(g_kept_at + program * N + c)
    # lw_s is in the exponents of r_t for t > s, of 1 / k_t for t >= s and of the whole.
    k = tl.load(k_at + tokens).to(tl.float32)
    from_key = -k * g_k
    total = r * g_r + from_key
    for s in range(L):
        later = tl.where(t[:, None] > s, total, tl.where(t[:, None] == s, from_key, 0.0))
        tl.store(g_lw_at + first + s * row + c, tl.sum(later, 0) + g_last)
    g_bonus = tl.load(g_pairs_at + (program * L + t) * L + t)[:, None]
    u = tl.load(u_at + (program % heads) * N + c).to(tl.float32)[None, :]
    g_r += g_bonus * (u * k)
    g_k += g_bonus * (u * r)
    tl.store(g_r_at + tokens, g_r.to(g_r_at.dtype.element_ty))
    tl.store(g_k_at + tokens, g_k.to(g_k_at.dtype.element_ty))
    tl.store(g_u_at + program * N + c, tl.sum(g_bonus * r * k, 0))


def shapes(r: Tensor, chunk: int) -> tuple[tuple[int, int, int], int]:
    """((B, n, H), N) of [B, n * L, H, N]."""
    batch, length, heads, size = r.shape
    return (batch, length // chunk, heads), size


FACTORS = "(Tensor r, Tensor k, Tensor lw, Tensor u, int chunk) -> (Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op("rwkv_training::factors", mutates_args=(), schema=FACTORS)
def factors(r: Tensor, k: Tensor, lw: Tensor, u: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`training.factors.factors` in fp32; chunk and N are powers of two."""
    r, k, lw, u = (x.contiguous() for x in (r, k, lw, u))
    outputs = allocate(r, k, lw, u, chunk)
    grid, size = shapes(r, chunk)
    factors_kernel[(grid[0] * grid[1] * grid[2],)](r, k, lw, u, *outputs, grid[2], L=chunk, N=size, num_warps=1)
    return outputs


@factors.register_fake
def allocate(r: Tensor, k: Tensor, lw: Tensor, u: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of :func:`factors`, empty."""
    grid, size = shapes(r, chunk)
    pairs = lw.new_empty((*grid, chunk, chunk))
    received, keys = (lw.new_empty((*grid, chunk, size)) for _ in range(2))
    return pairs, received, keys, lw.new_empty((*grid, size))


GRADIENTS = (
    "(Tensor r, Tensor k, Tensor lw, Tensor u, Tensor g_pairs, Tensor g_received, Tensor g_keys, Tensor g_kept,"
    " int chunk) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("rwkv_training::factor_gradients", mutates_args=(), schema=GRADIENTS)
def partial_gradients(
    r: Tensor, k: Tensor, lw: Tensor, u: Tensor,
    g_pairs: Tensor, g_received: Tensor, g_keys: Tensor, g_kept: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`factor_gradients` with that of u for each chunk: [B, n, H, N]."""
    inputs = [x.contiguous() for x in (r, k, lw, u, g_pairs, g_received, g_keys, g_kept)]
    outputs = allocate_gradients(*inputs, chunk)
    grid, size = shapes(r, chunk)
    channels = min(size, CHANNELS)
    gradients_kernel[(grid[0] * grid[1] * grid[2], size // channels)](
        *inputs, *outputs, grid[2], L=chunk, N=size, C=channels, num_warps=1
    )
    return outputs


@partial_gradients.register_fake
def allocate_gradients(
    r: Tensor, k: Tensor, lw: Tensor, u: Tensor,
    g_pairs: Tensor, g_received: Tensor, g_keys: Tensor, g_kept: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The outputs of :func:`partial_gradients`, empty."""
    g_r, g_k, g_lw = (x.new_empty(x.shape) for x in (r, k, lw))
    grid, size = shapes(r, chunk)
    return g_r, g_k, g_lw, lw.new_empty((*grid, size))


def factor_gradients(
    r: Tensor, k: Tensor, lw: Tensor, u: Tensor,
    g_pairs: Tensor, g_received: Tensor, g_keys: Tensor, g_kept: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`training.factors.factor_gradients`."""
    g_r, g_k, g_lw, g_u = partial_gradients(r, k, lw, u, g_pairs, g_received, g_keys, g_kept, chunk)
    return g_r, g_k, g_lw, g_u.sum((0, 1))

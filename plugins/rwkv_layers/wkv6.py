"""The WKV recurrence of RWKV-6, one token at a time and in parallel chunks.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(e^{log_w_t}) S + k_t^T v_t

r, k, v, log_w are [B, T, H, N] (log_w <= 0), u is [H, N], S is [B, H, K, V] with K = V = N; S is updated in place.
All arithmetic is float32. Annotations here are real types, not strings: torch.jit.script reads them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wkv_step(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """One token, T = 1 -> [B, 1, H, N] float32. The bonus never becomes a matrix: r (u * k^T v) = (r u . k) v."""
    B, _, H, N = r.shape
    state = s.view(B * H, N, N)
    r, k, v = r.float(), k.float(), v.float()
    bonus = (r * u).mul_(k).sum(-1, keepdim=True)  # [B, 1, H, 1]
    read = torch.bmm(r.view(B * H, 1, N), state).view(B, 1, H, N)
    state.mul_(torch.exp(log_w).view(B * H, N, 1)).addcmul_(k.view(B * H, N, 1), v.view(B * H, 1, N))
    return read.addcmul_(bonus, v)


def wkv_chunked(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """Many tokens at once -> [B, T, H, N] float32.

    A slab of tokens at a time, small enough to stay in a processor's cache (1.1 to 1.4 times as fast as all at once);
    a GPU takes all at once, which starts the fewest kernels.
    """
    B, T, H, N = r.shape
    L = 1
    while L < 32 and L < T:
        L *= 2
    padded = (T + L - 1) // L * L
    slab = max(L, (1 << 17) // (B * H * N) // L * L) if r.is_cpu else padded
    out = torch.empty(B, padded, H, N, dtype=torch.float32, device=r.device)
    for start in range(0, T, slab):
        r_, k_, v_, w_ = [_by_chunk(t[:, start : start + slab], L) for t in (r, k, v, log_w)]
        chunks = _chunks(r_, k_, v_, _kept(w_.exp_()), u.repeat(B, 1).unsqueeze(1), s.view(B * H, N, N))
        part = out[:, start : start + slab]
        part.view(B, -1, L, H, N).copy_(chunks.view(-1, B, H, L, N).permute(1, 0, 3, 2, 4))
    return out[:, :T]


def _by_chunk(t: Tensor, L: int) -> Tensor:
    """[B, T, H, N] -> a float32 copy [c, B*H, L, N]. Padded tokens have k = 0 and w = 1: they change nothing."""
    B, T, H, N = t.shape
    c = (T + L - 1) // L
    if c * L > T:
        t = F.pad(t, [0, 0, 0, 0, 0, c * L - T])
    by_chunk = torch.empty(c, B, H, L, N, dtype=torch.float32, device=t.device)
    return by_chunk.copy_(t.view(B, c, L, H, N).permute(1, 0, 3, 2, 4)).view(c, B * H, L, N)


def _chunks(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """r, k, v, w [c, X, L, N], u [X, 1, N], s [X, N, N], X rows and heads -> [c, X, L, N]. Changes r, k and s."""
    c, X, L, N = r.shape
    bonus = (r * u).mul_(k).sum(-1)  # [c, X, L]
    scores, kept = _pairs(r.view(c * X, L, N), k.view(c * X, L, N), w.view(c * X, L, N))
    scores.diagonal(0, 1, 2).copy_(bonus.view(c * X, L))
    out = torch.bmm(scores, v.view(c * X, L, N)).view(c, X, L, N)
    kept = kept.view(c, X, N, 1)
    for i in range(c):
        out[i].baddbmm_(r[i], s)
        s.mul_(kept[i]).baddbmm_(k[i].transpose(1, 2), v[i])
    return out


def _kept(w: Tensor) -> Tensor:
    """Decays, those below 1e-12 made 0: what they leave is far below float32's rounding.

    Strong decays would otherwise end in subnormal numbers, on which processors are slow: without this wkv_chunked
    takes 1.2 times as long on the story model, 1.7 times on one with decays spread wide.
    """
    return torch.threshold_(w, 1e-12, 0.0)


def _pairs(r: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """What each place sees of those before it. r, k, w [X, L, N], L a power of two -> [X, L, L], decay [X, N].

    Blocks of `m` places are joined two by two: r reaches back to the start of its block, k on to the end of its own,
    so their product is the whole way between two places in neighbouring blocks. Decays are only ever multiplied,
    each at most 1, never divided: nothing overflows and nothing cancels, however strong they are.

    Leaves r as read from the start of the chunk, k as it stands at the end; the decay is over the whole chunk.
    """
    X, L, N = r.shape
    scores = torch.zeros(X, L + 1, L, dtype=r.dtype, device=r.device)  # the spare row gives all blocks one stride
    m = 1
    while m < L:
        later, earlier = r.view(-1, 2 * m, N)[:, m:], k.view(-1, 2 * m, N)[:, :m]
        blocks = scores.as_strided([X * L // (2 * m), m, m], [2 * m * (L + 1), L, 1], m * L)
        blocks.copy_(torch.bmm(later, earlier.transpose(1, 2)))
        w = w.view(-1, 2, N)
        later.mul_(w[:, :1])
        earlier.mul_(w[:, 1:])
        w = _kept(w[:, 0] * w[:, 1])
        m *= 2
    return scores[:, :L], w.view(X, N)

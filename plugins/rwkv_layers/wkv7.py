"""The WKV recurrence of RWKV-7 (a generalised delta rule), one token at a time and in parallel chunks.

    S <- (diag(w_t) + b_t a_t^T) S + k_t v_t^T        o_t = r_t^T S

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456; their S is the transpose of
this one. r, w, k, v, a, b are float32 [B, T, H, N]; S is [B, H, K, V] with K = V = N. In RWKV-7 a = -kappa and
b = kappa * rate for a unit vector kappa and a rate from 0 to 1, and w is from exp(-exp(-1/2)) = 0.545 to 1.
Annotations here are real types, not strings: torch.jit.script reads them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wkv_step(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One token: T = 1."""
    B, _, H, N = r.shape
    seen = torch.matmul(a.view(B, H, 1, N), s)  # [B, H, 1, V]: what the state holds under the key a
    s = torch.addcmul(s * w.view(B, H, N, 1), b.view(B, H, N, 1), seen)
    s = torch.addcmul(s, k.view(B, H, N, 1), v.view(B, H, 1, N))
    return torch.matmul(r.view(B, H, 1, N), s).view(B, 1, H, N), s


def wkv_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Many tokens at once, in chunks of 16 (the UT transform of the delta rule: Yang et al., arXiv:2406.06484).

    With P_t = w_1 ... w_t from the chunk's start, u_t = a_t^T S_{t-1} solves the unit triangular system

        u_t - sum_{j<t} (a_t P_{t-1} / P_j . b_j) u_j  =  (a_t P_{t-1})^T S_0 + sum_{j<t} (a_t P_{t-1} / P_j . k_j) v_j

    so that u, the outputs and the chunk's last state are linear in S_0; only S_0 goes from chunk to chunk in turn.
    The decays of RWKV-7 are bounded, 1 / P_j <= exp(16 exp(-1/2)) = 16,400: here, unlike in RWKV-6, a decay between
    two places may be taken apart into factors, which rounds each term but loses nothing.
    """
    B, T, H, N = r.shape
    L = min(16, T)
    r, k, v, a, b = [_cut(t, L, 0.0) for t in (r, k, v, a, b)]  # [c, B*H, L, N]
    until = torch.cumprod(_cut(w, L, 1.0), 2)  # P_t
    kept = until[:, :, -1].unsqueeze(-1)  # [c, B*H, N, 1]: P_L
    r = r * until
    a = a * F.pad(until[:, :, :-1], [0, 0, 1, 0], value=1.0)
    k_t = (k / until).transpose(2, 3)  # [c, B*H, N, L]
    b_t = (b / until).transpose(2, 3)

    # Powers of the matrix, which need no substitution, lose four digits where keys repeat; its inverse is harmless.
    mixed = -torch.matmul(a, b_t).tril(-1)  # [c, B*H, L, L]
    ones = torch.eye(L, dtype=r.dtype, device=r.device).expand_as(mixed)
    solve = torch.linalg.solve_triangular(mixed, ones, upper=False, unitriangular=True)
    u_state = torch.matmul(solve, a)  # u = u_state S_0 + u_own
    u_own = torch.matmul(solve, torch.matmul(torch.matmul(a, k_t).tril(-1), v))
    from_b = torch.matmul(r, b_t).tril()
    out_state = r + torch.matmul(from_b, u_state)
    out_own = torch.matmul(torch.matmul(r, k_t).tril(), v) + torch.matmul(from_b, u_own)

    state = torch.cat([u_state, out_state], 2)  # [c, B*H, 2L, K]
    own = torch.cat([u_own, out_own], 2)  # [c, B*H, 2L, V]
    added = kept * torch.matmul(k_t, v)  # [c, B*H, K, V]
    b_t = kept * b_t
    shape = s.shape
    s = s.reshape(B * H, N, N)
    outs: list[Tensor] = []
    for c in range(len(own)):
        u_out = torch.baddbmm(own[c], state[c], s)
        outs.append(u_out[:, L:])
        s = torch.baddbmm(torch.addcmul(added[c], kept[c], s), b_t[c], u_out[:, :L])
    out = torch.stack(outs).view(-1, B, H, L, N).permute(1, 0, 3, 2, 4)  # [B, c, L, H, N]
    return out.reshape(B, -1, H, N)[:, :T], s.view(shape)


def _cut(t: Tensor, L: int, padding: float) -> Tensor:
    """[B, T, H, N] -> chunks [c, B*H, L, N]. Padded to whole ones with tokens that change nothing: w = 1, k = b = 0."""
    B, T, H, N = t.shape
    if T % L > 0:
        t = F.pad(t, [0, 0, 0, 0, 0, L - T % L], value=padding)
    return t.view(B, -1, L, H, N).permute(1, 0, 3, 2, 4).reshape(-1, B * H, L, N)

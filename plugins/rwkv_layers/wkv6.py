"""The WKV recurrence of RWKV-6, one token at a time and in parallel chunks.

    o_t = r_t (S + u * k_t^T v_t)        S <- diag(e^{log_w_t}) S + k_t^T v_t

r, k, v, log_w are float32 [B, T, H, N] (log_w <= 0), u is [H, N], S is [B, H, K, V] with K = V = N.
Annotations here are real types, not strings: torch.jit.script reads them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wkv_step(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One token: T = 1."""
    B, _, H, N = r.shape
    kv = k.view(B, H, N, 1) * v.view(B, H, 1, N)
    out = torch.matmul(r.view(B, H, 1, N), torch.addcmul(s, u.view(1, H, N, 1), kv))  # [B, H, 1, N]
    return out.view(B, 1, H, N), torch.addcmul(kv, torch.exp(log_w).view(B, H, N, 1), s)


def wkv_chunked(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Many tokens at once: inside a chunk by the distance of two tokens, between chunks through the state.

    A decay between two places is the product of the decays between them, each at most 1, never a quotient or a
    difference of longer ones: nothing overflows and nothing cancels, however strong the decays.
    """
    B, T, H, N = r.shape
    L = min(16, T)
    chunks = (T + L - 1) // L
    w = torch.exp(log_w)
    if chunks * L > T:
        # A padded token has k = 0 and w = 1: it changes neither the state nor another token's output.
        pad = [0, 0, 0, 0, 0, chunks * L - T]
        r, k, v, w = F.pad(r, pad), F.pad(k, pad), F.pad(v, pad), F.pad(w, pad, value=1.0)
    r, k, v, w = [t.reshape(B, chunks, L, H, N) for t in (r, k, v, w)]

    scores = torch.zeros(B, chunks, H, L, L, dtype=r.dtype, device=r.device)
    scores.diagonal(0, 3, 4).copy_((r * u * k).sum(-1).transpose(2, 3))  # the bonus of the token itself
    past = k[:, :, :-1]  # what place t sees of the token `distance` places before it
    for distance in range(1, L):
        pairs = (r[:, :, distance:] * past).sum(-1)  # [B, c, L - distance, H]
        scores.diagonal(-distance, 3, 4).copy_(pairs.transpose(2, 3))
        past = (past * w[:, :, distance:])[:, :, :-1]
    out = torch.matmul(scores, v.transpose(2, 3))  # [B, c, H, L, N]

    until = torch.cumprod(w, 2)  # [B, c, L, H, N]
    since = torch.cumprod(w.flip(2), 2).flip(2)
    r_in, k_out = r.clone(), k.clone()
    r_in[:, :, 1:] *= until[:, :, :-1]  # reads the state the chunk starts from
    k_out[:, :, :-1] *= since[:, :, 1:]  # writes the state the chunk ends with
    added = torch.matmul(k_out.permute(0, 1, 3, 4, 2), v.transpose(2, 3))  # [B, c, H, N, N]
    kept = until[:, :, -1].unsqueeze(-1)  # [B, c, H, N, 1]
    starts: list[Tensor] = []
    for c in range(chunks):
        starts.append(s)
        s = torch.addcmul(added[:, c], kept[:, c], s)
    out = out + torch.matmul(r_in.transpose(2, 3), torch.stack(starts, 1))
    return out.transpose(2, 3).reshape(B, chunks * L, H, N)[:, :T], s

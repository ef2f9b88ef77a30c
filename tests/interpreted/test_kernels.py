"""Each kernel does what its naive twin does, on shapes off the sizes of its tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drawn import TUNING, B, C, D, Draw, R, V, assert_close, normed, shifted, stored
from helpers import apart
from rwkv_backends.kernels import mixing, vector, wkv6
from rwkv_backends.kernels.tuning import Tuning
from rwkv_layers.linear import Matrix
from torch import Tensor

DECAYS = {"usual": (-3.0, 0.5), "strong": (2.0, 3.0), "dead": (5.0, 80.0), "weak": (-30.0, -10.0), "all": (-20.0, 6.0)}
"""log w = -e^x for x between these."""


def test_embed(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    tokens, emb, norm = torch.tensor([3, 0, 36]), draw(V, C), draw.norm()
    assert_close(dtype, (mixing.embed(tokens, emb, norm, TUNING), normed(emb[tokens], norm)))


def test_shift_lora(dtype: torch.dtype, tuning: Tuning) -> None:
    draw = Draw(dtype)
    x, prev, norm, maa, w = draw(B, C), draw(B, C), draw.norm(), draw(C), draw.matrix(5 * R, C)
    ours = vector.shift_lora(x, prev, norm, maa, w, tuning)
    e = normed(x, norm)
    dx = shifted(e, prev, 1)
    assert_close(dtype, *zip(ours, (e, dx, (e + dx * maa.double()) @ w.double().t()), strict=True))


def test_lerps_of_few_rows(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    e, dx, w, lora, prev = draw(B, C), draw(B, C), draw(5, R + 1, C), draw(B, 5 * R), draw(B, C)
    ours = vector.lerps(lora, e, dx, w, prev, TUNING)
    low = torch.tanh(lora.double()).view(B, 5, R).transpose(0, 1)
    assert_close(dtype, (ours, e + dx * (torch.bmm(low, w.double()[:, :R]) + w.double()[:, R:])))
    assert torch.equal(prev, e)


def test_kvrg(dtype: torch.dtype, int8: bool, tuning: Tuning) -> None:
    draw = Draw(dtype)
    mixed, low = draw(5, B, C), draw.matrix(D, C)
    matrices, w = stored(draw(4, C, C), int8)
    ours = vector.kvrg(mixed, matrices, low, tuning)
    twins = torch.bmm(mixed[1:].double(), w.transpose(1, 2)), mixed[0].double() @ low.double().t()
    assert_close(dtype, *zip(ours, twins, strict=True))


def test_add_product(dtype: torch.dtype, int8: bool, tuning: Tuning) -> None:
    draw = Draw(dtype)
    x, y = draw(B, C), draw(B, C)
    matrix, w = stored(draw.matrix(C, C), int8)
    twin = x.double() + y.double() @ w.t()
    vector.add_product(y, matrix, x, tuning)
    assert_close(dtype, (x, twin))


def test_relu_squared(dtype: torch.dtype) -> None:
    k = Draw(dtype)(100, 170)  # more than two programs' share, and not a multiple of it
    twin = torch.relu(k.double()) ** 2
    assert mixing.relu_squared(k, TUNING) is k
    assert_close(dtype, (k, twin))


def test_head(dtype: torch.dtype, int8: bool, tuning: Tuning) -> None:
    draw = Draw(dtype)
    x, norm = draw(B, C), draw.norm()
    matrix, w = stored(draw.matrix(V, C), int8)
    ours = vector.head(x, norm, matrix, tuning)
    assert ours.dtype == torch.float32
    assert_close(dtype, (ours, normed(x, norm) @ w.t()))


@pytest.mark.parametrize(("mean", "first"), [(100.0, 0.0), (0.0, 1000.0)])
def test_the_norm_of_a_row_whose_mean_or_first_number_is_large(mean: float, first: float) -> None:
    draw = Draw(torch.float32)
    x, norm, w = draw(B, C) + mean, draw.norm(), draw.matrix(V, C)
    x[:, 0] += first
    assert apart(vector.head(x, norm, Matrix(w, None), TUNING), normed(x, norm) @ w.double().t()) < 1e-5


def recurrence(kvrg: Tensor, w: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64: kvrg [4, B*T, C], w [B*T, C] -> o [B*T, C] and the last state."""
    B, H, N, _ = s.shape
    k, v, r, _ = kvrg.double().view(4, B, -1, H, N).unbind(0)
    w, u, s = w.double().view(B, -1, H, N), u.double(), s.double()
    outs = []
    for t in range(k.shape[1]):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s + u[None, :, :, None] * kv))
        s = w[:, t][..., None] * s + kv
    return torch.stack(outs, 1).reshape(-1, H * N), s


def gated(o: Tensor, g: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    o = F.group_norm(o, len(norm[0]), norm[0].double().flatten(), norm[1].double().flatten(), 64e-5)
    return o * F.silu(g.double())


@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_one_token_through_the_wkv(dtype: torch.dtype, decay: str, N: int) -> None:
    draw, H = Draw(dtype), 2
    full = torch.float32
    kvrg, low, w = draw(4, B, H * N, dtype=full), draw(B, D, dtype=full), 0.1 * draw(H * N, D)
    raw = torch.empty(H * N).uniform_(*DECAYS[decay], generator=draw.generator)
    u, norm = draw(H, N, dtype=full), (draw(H, N, dtype=full), draw(H, N, dtype=full))
    kv = draw(B + 1, H, N, N, dtype=full)
    decays = torch.exp(-torch.exp(raw.double() + torch.tanh(low.double()) @ w.double().t()))
    o, end = recurrence(kvrg, decays, u, kv[:B])
    spare = kv[B].clone()
    out = wkv6.wkv(kvrg, low, w, raw, u, norm, kv[:B], draw(1), TUNING)
    assert_close(dtype, (out, gated(o, kvrg[3], norm)), (kv[:B], end))
    assert out.dtype == dtype
    assert torch.equal(kv[B], spare)


def test_a_state_in_float16_stops_at_its_largest_number() -> None:
    """One that forgets nothing."""
    draw, H, N = Draw(torch.float32), 2, 16
    kvrg, low, w, raw = draw(4, B, H * N) * 100, draw(B, D), 0.1 * draw(H * N, D), torch.full((H * N,), -100.0)
    u, norm, kv = draw(H, N), (draw(H, N), draw(H, N)), draw(B, H, N, N).mul(1e5).clamp(-65504, 65504).half()
    o, end = recurrence(kvrg, torch.ones(B, H * N), u, kv)
    out = wkv6.wkv(kvrg, low, w, raw, u, norm, kv, draw(1), TUNING)
    assert_close(torch.float32, (out, gated(o, kvrg[3], norm)))
    assert bool((end.abs() > 65520).any())
    torch.testing.assert_close(kv, end.clamp(-65504, 65504).half())

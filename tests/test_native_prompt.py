"""What native does between the products of a prompt, against the plain form of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import CPU, apart, tiny_config
from rwkv_backends.eager import Eager
from rwkv_backends.native import Native, build
from rwkv_backends.native.prompt6 import HEAD, TimeMixing6
from rwkv_backends.native.team import find_team
from rwkv_layers.rwkv6 import TimeMixing, attended
from torch import Tensor

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.plugins import Plugins

pytestmark = pytest.mark.skipif(Native().why_not(None) is not None, reason=str(Native().why_not(None)))
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of what is written in a type, beside float64: the plain form rounds three times as it goes."""


@pytest.fixture(scope="module")
def native() -> TimeMixing6:
    team = find_team()
    assert team is not None
    return TimeMixing6(build.library("rwkv6.c"), team)


def weights(H: int) -> TimeMixing:
    draw = torch.Generator().manual_seed(H)
    bonus, weight, bias = torch.randn(3, H, HEAD, generator=draw).unbind(0)
    none: dict[str, None] = dict.fromkeys(TimeMixing._fields)
    return TimeMixing(**none | {"bonus": bonus, "ln_x_weight": weight, "ln_x_bias": bias})  # type: ignore[arg-type]


def inputs(B: int, T: int, H: int, dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(B * T * H)
    kvrg = torch.randn(4, B, T, H, HEAD, generator=draw).to(dtype)
    raw = torch.randn(B, T, H, HEAD, generator=draw) * spread - 2
    return kvrg, raw, torch.randn(B, H, HEAD, HEAD, generator=draw)


def exactly(kvrg: Tensor, raw: Tensor, kv: Tensor, w: TimeMixing) -> tuple[Tensor, Tensor]:
    """In float64, token by token -> out [B, T, C] and the state."""
    k, v, r, g = kvrg.double().unbind(0)
    decay, state, outs = torch.exp(-raw.double().exp()), kv.double(), []
    for t in range(raw.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((r[:, t, :, :, None] * (state + w.bonus[:, :, None] * added)).sum(-2))
        state = decay[:, t, :, :, None] * state + added
    out = torch.layer_norm(torch.stack(outs, dim=1), [HEAD], eps=64e-5) * w.ln_x_weight + w.ln_x_bias
    return (out * torch.nn.functional.silu(g)).flatten(2), state


@pytest.mark.parametrize("spread", [1.0, 5.0], ids=["decays", "strong and weak decays"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(("B", "T", "H"), [(1, 2, 1), (2, 45, 3), (3, 64, 2)])
def test_attention_of_a_prompt(B: int, T: int, H: int, dtype: torch.dtype, spread: float, native: TimeMixing6) -> None:
    w, (kvrg, raw, kv) = weights(H), inputs(B, T, H, dtype, spread)
    expected, state = exactly(kvrg, raw, kv, w)
    plain_kv = kv.clone()
    plain = attended(kvrg, raw.clone(), plain_kv, w, dtype)
    out = native.attended(kvrg, raw, kv, w)
    assert out.dtype == dtype
    assert apart(out, expected) < ROUNDED[dtype]
    assert apart(out, plain.double()) < 4 * ROUNDED[dtype]
    assert apart(kv, state) < 1e-6
    assert apart(kv, plain_kv.double()) < 1e-5


def test_the_number_of_threads_changes_no_bit(native: TimeMixing6) -> None:
    w, results, before = weights(5), [], torch.get_num_threads()
    for threads in (1, 2, 3):
        kvrg, raw, kv = inputs(1, 20, 5, torch.bfloat16, 1.0)
        torch.set_num_threads(threads)
        results.append((native.attended(kvrg, raw, kv, w), kv))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("head_size", [16, HEAD])
def test_a_prompt_is_read_as_plain_pytorch_reads_it(head_size: int, dtype: torch.dtype, plugins: Plugins) -> None:
    """Heads of other sizes are left to it."""
    architecture = plugins.architectures.get("rwkv6")
    config = replace(tiny_config(architecture), n_embd=128, n_head=128 // head_size, head_size=head_size, n_ffn=448)
    model = build_model(architecture.random(config), plugins.architectures, CPU, dtype)
    tokens = torch.arange(2 * 40).view(2, 40)
    ours, theirs = model.new_state(2), model.new_state(2)
    logits = Native().forward(model)(tokens, ours, every=True)
    plain = Eager().forward(model)(tokens, theirs, every=True)
    assert apart(logits, plain.double()) < 10 * ROUNDED[dtype]
    assert apart(ours["att_kv"], theirs["att_kv"].double()) < 10 * ROUNDED[dtype]
    assert torch.equal(logits, plain) == (head_size != HEAD)

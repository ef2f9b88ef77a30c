"""Training's kernels on a GPU: right there too, compiled with the rest of a block, and the whole of a step."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from helpers import apart, off
from rwkv_backends.fused import interpreted
from torch import Tensor

from training import factors as plain
from training.model import Block, ModelConfig, StoryModel
from training.optimizers import EAGER_STEPS, CapturedUpdate, Update, make_optimizers, set_rate
from training.wkv import wkv, wkv_recurrence

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(interpreted(), reason="Triton's interpreter is on"),
]


def inputs(T: int) -> list[Tensor]:
    """r, k, v, lw [2, T, 4, 64], some channels that forget at once and some that keep all, and u [4, 64]."""
    draw = torch.Generator().manual_seed(T)
    r, k, v, noise = (torch.randn(2, T, 4, 64, generator=draw) for _ in range(4))
    lw = -torch.exp(noise * 3 - 2).clamp(max=40.0)
    return [x.cuda() for x in (r, k, v, lw, torch.randn(4, 64, generator=draw))]


@pytest.mark.parametrize("chunk", [16, 32])
def test_wkv_by_kernels_is_the_recurrence(chunk: int) -> None:
    given = [x.requires_grad_() for x in inputs(100)]
    exact = [x.detach().double().requires_grad_() for x in given]
    r, k, v, lw, u = given
    out, expected = wkv(r, k, v, lw, u, chunk, True), wkv_recurrence(*exact)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, given, direction)
    references = torch.autograd.grad(expected, exact, direction.double())
    for value, reference in zip((out, *gradients), (expected, *references), strict=True):
        assert apart(value, reference) < 1e-4


@pytest.mark.parametrize("chunk", [16, 32])
def test_kernels_do_what_plain_torch_does_with_bfloat16(chunk: int) -> None:
    from training import wkv_kernels

    r, k, _, lw, u = inputs(128)
    r, k = r.bfloat16(), k.bfloat16()
    results = plain.factors(r, k, lw, u, chunk)
    for value, reference in zip(wkv_kernels.factors(r, k, lw, u, chunk), results, strict=True):
        assert apart(value, reference) < 2e-5
    torch.manual_seed(chunk)
    towards = [torch.randn_like(x) for x in results]
    expected = plain.factor_gradients(r, k, lw, u, *towards, chunk)
    for value, reference in zip(wkv_kernels.factor_gradients(r, k, lw, u, *towards, chunk), expected, strict=True):
        assert apart(value, reference) < (0.01 if value.dtype == torch.bfloat16 else 2e-5)


def test_a_compiled_block_is_the_same_with_kernels() -> None:
    """In one graph: an operator that breaks it would cost what the kernels save."""

    def results(kernels: bool) -> list[Tensor]:
        torch.manual_seed(1)
        block = Block(ModelConfig(dropout=0.0, kernels=kernels), 1).cuda()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        block.compile(dynamic=False, fullgraph=True)
        x = torch.randn(2, 128, 256, device="cuda", requires_grad=True)
        out = block(x, torch.bfloat16)
        return [out, *torch.autograd.grad(out.square().mean(), [x, *block.parameters()])]

    for value, reference in zip(results(True), results(False), strict=True):
        assert off(value, reference) < 0.02


@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_update_is_the_update(compiled: bool) -> None:
    """With dropout by the seed of each step and a learning rate that changes after the capture."""
    batches = torch.randint(300, (EAGER_STEPS + 4, 2, 65), generator=torch.Generator().manual_seed(1)).cuda()

    def results(captured: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = StoryModel(ModelConfig(300, 128, 2, dropout=0.2, kernels=True), torch.bfloat16).cuda()
        optimizers = make_optimizers(model, 1e-3, 0.1, use_muon=True)
        if compiled:
            model.compile_parts()
        plain = Update(model, optimizers, 1.0)
        update = CapturedUpdate(plain) if captured else plain
        losses = []
        for step, batch in enumerate(batches):
            torch.manual_seed(step)
            set_rate(optimizers, 1e-3 / (1 + step))
            losses.append(update(batch[:, :-1], batch[:, 1:])[0])
        return [torch.stack(losses), *(parameter.detach() for parameter in model.parameters())]

    for value, reference in zip(results(True), results(False), strict=True):
        assert off(value, reference) < 1e-3

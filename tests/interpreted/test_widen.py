"""The kernel that puts a step's logits into the engine's buffer does what `Backend.step` does."""

from __future__ import annotations

import pytest
import torch
from rwkv_backends.fused import Fused
from rwkv_backends.kernels.widen import Widened
from torch import Tensor

from rwkv_runtime import State
from rwkv_runtime.backend import Backend


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (3, 2048), (9, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_widened_and_masked(dtype: torch.dtype, rows: int, vocab: int, absent: bool) -> None:
    given = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    given[0, 5], given[-1, 6] = torch.nan, torch.inf
    mask = torch.where(torch.arange(vocab) % 3 == 0, -torch.inf, 0.0) if absent else None

    def forward(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        return given

    whole = Widened(forward)
    assert whole(torch.zeros(rows, 1), State({})).dtype == torch.float32
    ours, twin = torch.empty(rows + 1, vocab), torch.empty(rows + 1, vocab)
    Fused().step(whole, torch.zeros(rows, 1), State({}), mask, ours[:rows])
    Backend.step(Fused(), whole, torch.zeros(rows, 1), State({}), mask, twin[:rows])
    assert torch.equal(ours[:rows].nan_to_num(7e9), twin[:rows].nan_to_num(7e9))
    assert bool(ours[rows].isnan().all())


def test_a_forward_pass_of_float32_alone_is_left_to_plain_pytorch() -> None:
    logits = torch.empty(2, 9)
    Fused().step(lambda tokens, state: torch.ones(2, 9), torch.zeros(2, 1), State({}), None, logits)
    assert logits.eq(1).all()

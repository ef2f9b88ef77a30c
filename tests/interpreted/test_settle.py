"""The kernel that ends a draw settles what `Backend.settle` does."""

from __future__ import annotations

import pytest
import torch
from rwkv_backends.fused import Fused
from rwkv_backends.kernels import settle as kernels
from settling import check_settled

from rwkv_runtime import Outcome


def test_every_draw_is_settled_as_it_must() -> None:
    check_settled(Fused())


def test_what_is_no_row_of_tokens_is_left_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "settle", None)
    logits = torch.zeros(2, 9)
    rows = [torch.zeros(2, dtype=torch.int64), *(torch.zeros(2, 1, dtype=torch.int64) for _ in range(3))]
    outcome = Outcome(*rows)
    assert Fused().settle(torch.tensor([3, 9], dtype=torch.int32), logits, False, outcome).tolist() == [3, -1]
    with pytest.raises(RuntimeError):
        Fused().settle(torch.zeros(2, 1, dtype=torch.int64), logits, False, outcome)

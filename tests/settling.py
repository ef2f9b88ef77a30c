"""Draws that end well and draws that must not, for `Backend.settle` and its kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, Outcome

V = 5000  # more than a block of the kernel


class Draw(NamedTuple):
    """One row: what a sampler says of it, and what must come of that."""

    token: int
    changes: dict[int, float] = {}
    settled: int = -1
    whole: bool = True  # whether the row is one that can be drawn from


DRAWS = {
    "a token": Draw(7, settled=7),
    "the first": Draw(0, settled=0),
    "the last": Draw(V - 1, settled=V - 1),
    "a token of a row that is masked but for it": Draw(4999, dict.fromkeys(range(V - 1), -math.inf), 4999),
    "nothing": Draw(-1),
    "an id after the last": Draw(V),
    "a far one": Draw(1 << 40),
    "a far one below": Draw(-(1 << 40)),
    "a masked token": Draw(8, {8: -math.inf}),
    "a token whose logit is NaN": Draw(8, {8: math.nan}, whole=False),
    "a token whose logit is infinite": Draw(8, {8: math.inf}, whole=False),
    "a token beside NaN": Draw(8, {4900: math.nan}, whole=False),
    "a token beside infinity": Draw(8, {0: math.inf}, whole=False),
    "a token of an empty row": Draw(8, dict.fromkeys(range(V), -math.inf), whole=False),
}


def settle(backend: Backend, draws: list[Draw], refused: bool, device: str = "cpu") -> tuple[Outcome, Tensor]:
    """Settles these rows, each at a position of its own."""
    logits = torch.randn(len(draws), V, generator=torch.Generator().manual_seed(0))
    for row, draw in enumerate(draws):
        for i, value in draw.changes.items():
            logits[row, i] = value
    rows = torch.arange(len(draws), device=device)
    drawn, tokens = torch.full_like(rows, 99), torch.full_like(rows, 99)[:, None]
    outcome = Outcome(drawn, tokens, rows[:, None] * 3 + (1 << 40), torch.full_like(tokens, 99))
    token = torch.tensor([draw.token for draw in draws], device=device)
    return outcome, backend.settle(token, logits.to(device), refused, outcome)


def check_settled(backend: Backend, device: str = "cpu") -> None:
    """Whether a backend settles every draw as it must, in a batch and alone."""
    every = list(DRAWS.values())
    batches = [(every, False), ([draw for draw in every if draw.whole], True), *(([draw], False) for draw in every)]
    for draws, refused in batches:
        outcome, token = settle(backend, draws, refused, device)
        expected = [draw.settled for draw in draws]
        assert (token.tolist(), outcome.drawn.tolist()) == (expected, expected)
        assert outcome.tokens.tolist() == [[max(t, 0)] for t in expected]
        assert outcome.before.tolist() == [[(1 << 40) + 3 * row] for row in range(len(draws))]
        assert outcome.position.tolist() == [[(1 << 40) + 3 * row + 1] for row in range(len(draws))]

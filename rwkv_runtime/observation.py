"""What a sampler did at one step: the candidates, and their probability after the model and after each stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_runtime.controls import Controls
from rwkv_runtime.sampler import Sampler

MODEL = "model"


@dataclass(frozen=True)
class Observation:
    """One drawn token among its candidates.

    `stages` names the columns: "model", then each sampler of the chain. `log_probs[i][j]` is the natural logarithm of
    the probability of `candidates[i]` after stage j, -inf for one that is not kept. The candidates are the likeliest
    before and after sampling and the drawn one, likeliest first.
    """

    token: int
    stages: tuple[str, ...]
    candidates: tuple[int, ...]
    log_probs: tuple[tuple[float, ...], ...]

    def of(self, token: int) -> tuple[float, ...]:
        """Log-probabilities of one candidate. Raises ValueError for a token that is none."""
        return self.log_probs[self.candidates.index(token)]


@dataclass(frozen=True)
class BatchObservation:
    """Log-probabilities of all tokens of all rows after each stage, [stages, B, V]."""

    stages: tuple[str, ...]
    log_probs: Tensor

    def row(self, row: int, token: int, count: int) -> Observation:
        """The `count` likeliest candidates of one row."""
        each = self.log_probs[:, row]  # [stages, V]
        count = min(count, each.shape[-1])
        likely = [*each[0].topk(count).indices.tolist(), *each[-1].topk(count).indices.tolist()]
        drawn = [token] if token >= 0 else []
        kept = {i for i in likely[count:] if each[-1, i] > -torch.inf}
        chosen = sorted({*likely[:count], *kept, *drawn}, key=lambda i: (-each[-1, i].item(), -each[0, i].item(), i))
        values = each[:, chosen].T.tolist()
        return Observation(token, self.stages, tuple(chosen), tuple(tuple(v) for v in values))


def observe(sampler: Sampler, logits: Tensor, controls: Controls) -> BatchObservation:
    """Runs every stage's filter once more, [B, V] logits, and notes what it leaves."""
    names, results = [MODEL], [torch.log_softmax(logits, dim=-1)]
    for stage in sampler.stages:
        logits = stage.filter(logits, controls)
        names.append(stage.name)
        results.append(torch.log_softmax(logits, dim=-1))
    return BatchObservation(tuple(names), torch.stack(results))

"""What was drawn from: an observation as a table for people, or as a record for programs."""

from __future__ import annotations

import math
from typing import Any

from rwkv_runtime.observation import Observation
from rwkv_runtime.tokenizer import Tokenizer


def as_record(observation: Observation, tokenizer: Tokenizer) -> dict[str, Any]:
    """For JSON: the drawn token with its log-probability before and after sampling, then the candidates with theirs
    after every stage; null is a candidate that is not kept."""

    def number(log_prob: float) -> float | None:
        return log_prob if math.isfinite(log_prob) else None

    record: dict[str, Any] = {"token": observation.token}
    if observation.token >= 0:
        log_probs = observation.of(observation.token)
        record["text"] = text_of(observation.token, tokenizer)
        record |= {"before": number(log_probs[0]), "after": number(log_probs[-1])}
    candidates = [
        {"token": token, "text": text_of(token, tokenizer), "log_probs": [number(p) for p in log_probs]}
        for token, log_probs in zip(observation.candidates, observation.log_probs, strict=True)
    ]
    return record | {"stages": list(observation.stages), "candidates": candidates}


def table(observation: Observation, tokenizer: Tokenizer) -> str:
    """Lines of a table: candidates with their probability in percent after the model and each stage; > was drawn."""
    drawn = quoted(observation.token, tokenizer) if observation.token >= 0 else "nothing can be drawn"
    rows = [["", "", *observation.stages]]
    for token, log_probs in zip(observation.candidates, observation.log_probs, strict=True):
        cells = ["-" if p == -math.inf else f"{math.exp(p):.2%}" for p in log_probs]
        rows.append([">" if token == observation.token else "", quoted(token, tokenizer), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join([drawn, *lines, ""])


def quoted(token: int, tokenizer: Tokenizer) -> str:
    """The token as a Python literal would show it, spaces and newlines visible."""
    return "<end of text>" if token == 0 else repr(text_of(token, tokenizer))


def text_of(token: int, tokenizer: Tokenizer) -> str:
    """The token's text; bytes that are no text alone are replaced. An id without a token is shown as #id."""
    if token and token not in tokenizer.tokens:
        return f"#{token}"
    return tokenizer.decode([token])

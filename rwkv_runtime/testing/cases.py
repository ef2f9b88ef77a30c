"""Hard rows for a sampler: logits that break things, parameters at their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_runtime.sampler import Sampler

BAD = ("NaN", "+inf", "all masked")
"""Rows that cannot be drawn from: the engine fails them, and they must not harm their batch-mates."""


class Case(NamedTuple):
    """One row: logits, the values of the parameters, a seed."""

    kind: str
    logits: Tensor  # [V]
    values: Mapping[str, float | str]
    seed: int

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in self.values.items() if not isinstance(value, str))
        return f"logits: {self.kind}{'; ' * bool(values)}{values}"


def cases_of(sampler: Sampler, vocab_size: int) -> Iterator[Case]:
    """Every hard row with every setting; rows that cannot be drawn from with the defaults alone."""
    settings = list(settings_of(sampler, vocab_size))
    for kind, logits in hard_logits(vocab_size).items():
        for values in settings[:1] if kind in BAD else settings:
            yield Case(kind, logits, values, seed=0x9E3779B97F4A7C15 + len(kind))


def hard_logits(V: int) -> dict[str, Tensor]:
    normal = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 3
    odd = torch.arange(V) % 2 == 1
    one = torch.full((V,), -torch.inf)
    one[V // 2] = 1.5
    nan, infinite = normal.clone(), normal.clone()
    nan[1], infinite[2] = torch.nan, torch.inf
    return {
        "normal": normal,
        "half of them masked": normal.masked_fill(odd, -torch.inf),
        "all equal": torch.zeros(V),
        "two equal maxima": normal.clamp(max=float(normal.sort().values[-2])),
        "one finite": one,
        "from -10000 to 10000": torch.linspace(-1e4, 1e4, V),
        "NaN": nan,
        "+inf": infinite,
        "all masked": torch.full((V,), -torch.inf),
    }


def settings_of(sampler: Sampler, vocab_size: int) -> Iterator[dict[str, float | str]]:
    """The defaults, then every number at its bounds and neutral value, alone and all together; texts stay."""
    defaults: dict[str, float | str] = {name: param.default for name, param in sampler.params.items()}
    yield defaults
    edges: dict[str, list[float]] = {}
    for name, param in sampler.params.items():
        if isinstance(param.default, str):
            continue
        off = None if isinstance(param.off, str) else param.off
        wanted: list[float | None] = [param.low, param.high, off]
        if isinstance(param.default, int):
            wanted += [1, vocab_size + 1]  # more than there are tokens
        fit = [v for v in wanted if v is not None and math.isfinite(v) and param.low <= v <= param.high]
        edges[name] = [float(param.check(name, value)) for value in fit] or [param.default]
        yield from ({**defaults, name: value} for value in sorted({*edges[name]} - {param.default}))
    if len(edges) > 1:
        yield defaults | {name: min(values) for name, values in edges.items()}
        yield defaults | {name: max(values) for name, values in edges.items()}

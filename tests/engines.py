"""Samplers and a backend that let tests decide what an engine writes."""

from __future__ import annotations

import math
from functools import partial

import torch
from rwkv_backends.eager import Eager
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

from rwkv_runtime.backend import Forward
from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.sampler import Param, Sampler
from rwkv_runtime.state import State, TensorSpec


class Scripted(Sampler):
    """Draws what it is told, by position, whatever the logits."""

    name = "scripted"
    runs = "graph"

    def __init__(self, script: bytes | list[int]) -> None:
        ids = [byte + 1 for byte in script] if isinstance(script, bytes) else script
        self.script = torch.tensor(ids)

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        return self.script[controls.position[:, 0] % len(self.script)]


class Once(Sampler):
    """Never draws a token twice in one text."""

    name = "once"
    params = {"strength": Param(math.inf, 0.0, math.inf)}

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {"drawn": TensorSpec((vocab_size,), torch.bool)}

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return torch.where(controls.slots["drawn"], logits - controls["strength"], logits)

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        controls.slots["drawn"] |= controls.ids == tokens[:, None]


class Poisoned(Nucleus):
    """Nucleus, but a row's logits all become NaN, infinity or minus infinity at position `at`."""

    name = "poisoned"
    params = Nucleus.params | {"at": Param(-1, -1, 1000), "poison": Param(0, 0, 2)}

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        kept = super().filter(logits, controls)
        poison = torch.tensor([math.nan, math.inf, -math.inf])[controls["poison"]]
        return torch.where(controls.position == controls["at"], poison, kept)


class Counting(Eager):
    """Eager that counts how many tokens were read, and how many at a time."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def forward(self, model: Model) -> Forward:
        return partial(self._read, super().forward(model))

    def _read(self, forward: Forward, tokens: Tensor, state: State, every: bool = False) -> Tensor:
        self.reads.append((tokens.shape[0], tokens.shape[1]))
        return forward(tokens, state, every)

    @property
    def prompt_tokens(self) -> int:
        return sum(count for _, count in self.reads if count > 1)


def finish(engine: Engine, *requests: Request) -> list[Generation]:
    """Runs requests side by side to their ends."""
    generations = [engine.submit(request) for request in requests]
    while any(generation.finish is None for generation in generations):
        engine.step()
    return generations

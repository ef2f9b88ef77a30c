"""What a run of the benchmarks shares: its settings, the weights, who is loaded, and the results."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.checkpoints import VOCAB_SIZE, Checkpoint, make_checkpoint
from benchmarks.contestants import PACKAGE, PER_OP, Contestant, Decoder, Ours, Package, PerOpCompile, why_no_package
from rwkv_runtime import Model, Plugins
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.runtime import DTYPES

ARCHITECTURE = "rwkv6"
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
"""Largest difference of two logits, as a share of the largest logit."""
PROMPT, STEPS = 20, 4
"""How many tokens the check reads at once, then one by one."""


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    sizes: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    device: torch.device
    smoke: bool

    def rounds(self, full: int) -> int:
        return 1 if self.smoke else full


class Unavailable(Exception):
    """A contestant that cannot take part here, with the reason."""


@dataclass
class Arena:
    """One run. Only one set of weights is in memory at a time."""

    settings: Settings
    folder: Path
    plugins: Plugins
    ceilings: Ceilings
    records: list[dict[str, Any]] = field(default_factory=list)
    _checkpoints: dict[tuple[str, str], Checkpoint] = field(default_factory=dict)
    _lineup: Lineup | None = None

    def checkpoint(self, size: str, dtype: str) -> Checkpoint:
        if (size, dtype) not in self._checkpoints:
            architecture = self.plugins.architectures.get(ARCHITECTURE)
            self._checkpoints[size, dtype] = make_checkpoint(architecture, size, dtype, self.folder)
        return self._checkpoints[size, dtype]

    def lineup(self, size: str, dtype: str) -> Lineup:
        checkpoint = self.checkpoint(size, dtype)
        if self._lineup is None or self._lineup.checkpoint is not checkpoint:
            self._lineup = None
            gc.collect()  # the last weights go before the next ones come
            self._lineup = Lineup(checkpoint, self)
        return self._lineup

    def build(self, checkpoint: Checkpoint, device: torch.device, dtype: str | None = None) -> Model:
        kind = DTYPES[dtype] if dtype else None
        return build_model(checkpoint.tensors(), self.plugins.architectures, device, kind)


class Lineup:
    """All contestants on the same weights, loaded when first asked for and checked before they are timed."""

    def __init__(self, checkpoint: Checkpoint, arena: Arena) -> None:
        self.checkpoint, self.arena = checkpoint, arena
        self.device = arena.settings.device
        self._model: Model | None = None
        self._contestants: dict[str, Contestant] = {}
        self._decoders: dict[tuple[str, int], Decoder] = {}
        self._expected: Tensor | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            self._model = self.arena.build(self.checkpoint, self.device)
        return self._model

    def contestant(self, name: str) -> Contestant:
        """Loaded, and its prefill checked. Raises Unavailable."""
        if name not in self._contestants:
            contestant = self._load(name)
            self.check(contestant.prefill(self.tokens[:PROMPT]), PROMPT - 1, f"{name}, prefill")
            self._contestants[name] = contestant
        return self._contestants[name]

    def decoder(self, name: str, rows: int) -> Decoder:
        """Ready for a batch, and its steps checked. Raises Unavailable."""
        if (name, rows) not in self._decoders:
            decoder = self.contestant(name).decoder(rows)
            for place, token in enumerate(self.tokens[: PROMPT + STEPS]):
                decoder.feed([token] * rows)
                logits = decoder.step()
                if place >= PROMPT:
                    self.check(logits, place, f"{name}, decode of {rows} rows")
            self._decoders[name, rows] = decoder
        return self._decoders[name, rows]

    def _load(self, name: str) -> Contestant:
        if name == PACKAGE:
            if reason := why_no_package():
                raise Unavailable(reason)
            return Package(self.checkpoint, self.device)
        if name == PER_OP:
            if reason := self.arena.plugins.backends.get("compile").why_not(self.model):
                raise Unavailable(reason)
            return Ours(PerOpCompile(tune=not self.arena.settings.smoke), self.model)
        chosen = self.arena.plugins.backends.get(name)
        if reason := chosen.why_not(self.model):
            raise Unavailable(reason)
        return Ours(chosen, self.model)

    @property
    def tokens(self) -> list[int]:
        return [(7919 * i + 13) % VOCAB_SIZE for i in range(PROMPT + STEPS)]

    @property
    def expected(self) -> Tensor:
        """Logits [T, V] to check against: the float64 oracle's; for a large model eager float32's."""
        if self._expected is None:
            if self.checkpoint.size == "tiny":
                oracle = self.arena.plugins.architectures.get(ARCHITECTURE)
                self._expected = oracle.reference(self.checkpoint.tensors(), self.tokens)
            else:
                model = self.arena.build(self.checkpoint, self.device, "float32")
                eager = self.arena.plugins.backends.get("eager").forward(model)
                tokens = torch.tensor([self.tokens], device=self.device)
                self._expected = eager(tokens, model.new_state(), every=True)[0]
            self._expected = self._expected.double().cpu()
        return self._expected

    def check(self, logits: Tensor, place: int, who: str) -> None:
        """Raises AssertionError for logits [V] or [B, V] that are off after the token at `place`."""
        expected = self.expected[place]
        off = float((logits.double().cpu() - expected).abs().max() / expected.abs().max())
        allowed = TOLERANCE[self.checkpoint.dtype]
        assert off <= allowed, f"{who}: logits are {off:.1e} away from the reference, {allowed:.0e} is allowed"


def prompt(length: int) -> Sequence[int]:
    """Any tokens: dense arithmetic takes the same time for all."""
    return [(104729 * i + 11) % (VOCAB_SIZE - 100) + 1 for i in range(length)]

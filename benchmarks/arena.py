"""What a run of the benchmarks shares: its settings, the weights, who is loaded, and the results."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.checkpoints import VOCAB_SIZE, Checkpoint, make_checkpoint
from benchmarks.contestants import Contestant, Decoder
from benchmarks.entrants import entrants
from benchmarks.package import PACKAGE
from benchmarks.results import Results
from benchmarks.room import Unavailable, require
from rwkv_runtime import BackendError, Model, Plugins, chunk_size
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.settings import DTYPES

TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
"""Largest difference of two logits, as a share of the largest logit."""
TF32_TOLERANCE = 2e-3
"""That of float32 on a GPU: the `rwkv` package lets matrix products round to ten bits."""
PROMPT, STEPS = 20, 5
"""How many tokens the check reads at once, and how many one by one."""
ACTIVATIONS = 64
"""Float32 numbers a token and channel that a prefill holds at most, roughly."""


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    architectures: tuple[str, ...]
    sizes: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    contestants: tuple[str, ...]
    device: torch.device
    smoke: bool
    keep_weights: bool

    def rounds(self, full: int) -> int:
        return 1 if self.smoke else full


@dataclass
class Arena:
    """One run. Only one set of weights is in memory and on disk at a time."""

    settings: Settings
    folder: Path
    plugins: Plugins
    ceilings: Ceilings
    results: Results
    records: list[dict[str, Any]] = field(default_factory=list)
    _lineup: Lineup | None = None

    def lineup(self, architecture: str, size: str, dtype: str) -> Lineup:
        """The contestants on these weights. Raises Unavailable where there is no room for the weights."""
        asked = self.plugins.architectures.get(architecture), size, dtype
        current = self._lineup.checkpoint if self._lineup else None
        if current is None or (current.architecture, current.size, current.dtype) != asked:
            self._lineup = None
            collect()  # the last weights go before the next ones come
            if current and not self.settings.keep_weights:
                current.delete()
            self._lineup = Lineup(make_checkpoint(*asked, self.folder), self)
        assert self._lineup is not None
        return self._lineup

    def keep(self, record: dict[str, Any]) -> None:
        """For the summary, and in the file of results at once: a run that is stopped keeps what it has measured."""
        self.records.append(record)
        self.results.add(record)


class Lineup:
    """All contestants on the same weights, loaded when first asked for and checked before they are timed."""

    def __init__(self, checkpoint: Checkpoint, arena: Arena) -> None:
        self.checkpoint, self.arena = checkpoint, arena
        self.device = arena.settings.device
        self.entrants = entrants(arena.plugins, tune=not arena.settings.smoke)
        self._model: Model | None = None
        self._contestants: dict[str, Contestant] = {}
        self._decoders: dict[tuple[str, int], Decoder] = {}
        self._expected: Tensor | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            require(self.checkpoint.nbytes, self.device, "the model")
            self._model = build_model(self.checkpoint.tensors(), self.arena.plugins.architectures, self.device)
        return self._model

    def contestant(self, name: str) -> Contestant:
        """Loaded, and its prefill checked. Raises Unavailable."""
        if name not in self._contestants:
            if reason := self.entrants[name].why_not(self):
                raise Unavailable(reason)
            self._make_room(self.checkpoint.nbytes, name, f"another copy of {self.checkpoint.size}")
            try:
                contestant = self.entrants[name].load(self)
            except BackendError as error:
                raise Unavailable(str(error)) from error
            self.check(contestant.prefill([self.tokens[:PROMPT]])[0], PROMPT - 1, f"{name}, prefill")
            self._contestants[name] = contestant
        return self._contestants[name]

    def decoder(self, name: str, rows: int) -> Decoder:
        """Ready for a batch, and its steps checked. Raises Unavailable.

        One is kept, and the package's beside it: each has a state of its own, which for large batches is large.
        """
        if (name, rows) not in self._decoders:
            self._decoders = {key: d for key, d in self._decoders.items() if key == (PACKAGE, rows)}
            contestant = self.contestant(name)
            need = rows * (self.state_bytes(1) + 3 * 4 * VOCAB_SIZE)
            self._make_room(need, name, f"a batch of {rows} rows of {self.checkpoint.size}")
            decoder = contestant.decoder(rows)
            for place, token in enumerate(self.tokens[:STEPS]):
                decoder.feed([token] * rows)
                self.check(decoder.step(), place, f"{name}, decode of {rows} rows")
            self._decoders[name, rows] = decoder
        return self._decoders[name, rows]

    def room_for_prompts(self, name: str, prompts: int, length: int) -> None:
        """Raises Unavailable where reading them takes more memory than there is."""
        at_once = length if name == PACKAGE else prompts * min(length, chunk_size(self.model.device))
        need = at_once * ACTIVATIONS * 4 * self.model.config.n_embd + prompts * self.state_bytes(1)
        self._make_room(need, name, f"{prompts} prompts of {length} tokens of {self.checkpoint.size}")

    def state_bytes(self, rows: int) -> int:
        """Of the state of a batch, which a step reads and writes."""
        model = self.model
        spec = model.architecture.state_spec(model.config, model.dtype).values()
        return rows * model.config.n_layer * sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in spec)

    def bytes_per_step(self, rows: int) -> int:
        """What a decode step has to move: every matrix once, the state of each row to the processor and back."""
        return self.checkpoint.matrix_bytes + 2 * self.state_bytes(rows)

    def _make_room(self, need: int, name: str, what: str) -> None:
        """Lets go of contestants that are not needed now, where memory is short. Raises Unavailable."""
        try:
            require(need, self.device, what)
        except Unavailable:
            self._contestants = {key: c for key, c in self._contestants.items() if key in (name, PACKAGE)}
            collect()
            require(need, self.device, what)

    @property
    def tokens(self) -> list[int]:
        return [(7919 * i + 13) % VOCAB_SIZE for i in range(PROMPT)]

    @property
    def expected(self) -> Tensor:
        """Logits [T, V] to check against: the float64 oracle's; for a large model eager float32's."""
        path = self.checkpoint.pth.with_suffix(".logits")
        if self._expected is None and path.exists():
            self._expected = torch.load(path)
        if self._expected is None:
            if self.checkpoint.size == "tiny":
                expected = self.checkpoint.architecture.reference(self.checkpoint.tensors(), self.tokens)
            else:
                expected = self._in_float32()
            self._expected = expected.double().cpu()
            torch.save(self._expected, path)
        return self._expected

    def _in_float32(self) -> Tensor:
        itemsize = DTYPES[self.checkpoint.dtype].itemsize
        require(self.checkpoint.nbytes * 4 // itemsize, self.device, f"a float32 copy of {self.checkpoint.size}")
        architectures = self.arena.plugins.architectures
        with plain_float32(), torch.inference_mode():
            model = build_model(self.checkpoint.tensors(), architectures, self.device, torch.float32)
            eager = self.arena.plugins.backends.get("eager").forward(model)
            tokens = torch.tensor([self.tokens], device=self.device)
            return eager(tokens, model.new_state(), every=True)[0]

    def check(self, logits: Tensor, place: int, who: str) -> None:
        """Raises AssertionError for logits [V] or [B, V] that are off after the token at `place`."""
        expected = self.expected[place]
        off = float((logits.double().cpu() - expected).abs().max() / expected.abs().max())
        allowed = TOLERANCE[self.checkpoint.dtype]
        if self.checkpoint.dtype == "float32" and self.device.type == "cuda":
            allowed = TF32_TOLERANCE
        assert off <= allowed, f"{who}: logits are {off:.1e} away from the reference, {allowed:.0e} is allowed"


@contextmanager
def plain_float32() -> Iterator[None]:
    """Matrix products in whole float32 inside, whatever the `rwkv` package has set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def collect() -> None:
    """Frees what nobody holds any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prompt(length: int, start: int = 11) -> Sequence[int]:
    """Any tokens: dense arithmetic takes the same time for all."""
    return [(104729 * i + start) % (VOCAB_SIZE - 100) + 1 for i in range(length)]

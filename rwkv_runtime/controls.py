"""What a sampler reads for each row of a batch: parameters, seeds, positions, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_runtime import noise
from rwkv_runtime.memory import keep_freed_memory
from rwkv_runtime.state import TensorSpec
from rwkv_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rwkv_runtime.sampler import Sampler

BLOCK = 256
"""Scores in a block: a draw looks for the best one's place in one block alone."""


@dataclass(frozen=True)
class Controls:
    """Settings of B rows, all in tensors on the sampler's device, so that no row forces a recapture.

    `controls["top_p"]` is [B, 1]: float32, or int64 for a whole-number parameter.
    """

    values: Mapping[str, Tensor]
    """Parameters that are numbers, [B, 1] by name."""
    seed: Tensor
    """int64 [B, 1]."""
    position: Tensor
    """int64 [B, 1]: how many tokens came before the one to be drawn."""
    slots: Mapping[str, Tensor]
    """The samplers' own memory, [B, ...] by name; cleared at the start of a text."""
    ids: Tensor
    """int64 [1, V]: 0, 1, ..."""
    notes: Sequence[dict[str, Any]]
    """One dictionary a row, on the host: parameters that are texts, for `prime`, and whatever samplers with
    `runs = "host"` keep."""
    tokenizer: Tokenizer | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are texts at their defaults: the notes of a row that no text is written in."""

    @classmethod
    def allocate(
        cls,
        sampler: Sampler,
        rows: int,
        vocab_size: int,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> Controls:
        """Controls of `rows` rows, every parameter at its default."""
        if device.type == "cpu":
            keep_freed_memory()

        def full(default: float | str) -> Tensor:
            dtype = torch.int64 if isinstance(default, int) else torch.float32
            return torch.full((rows, 1), float(default), dtype=dtype, device=device)

        def slot(spec: TensorSpec) -> Tensor:
            return spec.allocate((rows,), device)

        numbers = {name: p.default for name, p in sampler.params.items() if not isinstance(p.default, str)}
        texts = {name: p.default for name, p in sampler.params.items() if isinstance(p.default, str)}
        seed, position = (torch.zeros((rows, 1), dtype=torch.int64, device=device) for _ in range(2))
        return cls(
            values={name: full(default) for name, default in numbers.items()},
            seed=seed,
            position=position,
            slots={name: slot(spec) for name, spec in sampler.slots(vocab_size).items()},
            ids=torch.arange(vocab_size, device=device)[None],
            notes=[dict(texts) for _ in range(rows)],
            tokenizer=tokenizer,
            texts=texts,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def view(self, start: int, stop: int) -> Controls:
        """Rows start..stop, sharing memory; the notes are shared too, as long as no row is set or moved."""
        values = {name: t[start:stop] for name, t in self.values.items()}
        slots = {name: t[start:stop] for name, t in self.slots.items()}
        seed, position = self.seed[start:stop], self.position[start:stop]
        return replace(self, values=values, seed=seed, position=position, slots=slots, notes=self.notes[start:stop])

    def clone(self) -> Controls:
        """The same rows in memory of their own; the notes stay shared."""
        values = {name: t.clone() for name, t in self.values.items()}
        slots = {name: t.clone() for name, t in self.slots.items()}
        return replace(self, values=values, seed=self.seed.clone(), position=self.position.clone(), slots=slots)

    def buffers(self) -> list[Tensor]:
        """Every per-row tensor."""
        return [*self.values.values(), self.seed, self.position, *self.slots.values()]

    def set(self, row: int, values: Mapping[str, float | str], seed: int, position: int) -> None:
        """Starts a row: its parameters, the low 64 bits of its seed, its position; slots and notes are cleared."""
        self.notes[row].clear()
        for name, value in values.items():
            if name in self.values:
                self.values[name][row] = float(value)
            else:
                self.notes[row][name] = value
        self.seed[row] = (seed & 0xFFFFFFFFFFFFFFFF) - ((seed >> 63 & 1) << 64)
        self.position[row] = position
        for slot in self.slots.values():
            slot[row].zero_()

    def move(self, source: int, row: int) -> None:
        """Moves all of one row into another."""
        for t in self.buffers():
            t[row].copy_(t[source])
        self.notes[row].clear()
        self.notes[row].update(self.notes[source])
        self.notes[source].clear()
        self.notes[source].update(self.texts)

    def uniform(self, stream: int) -> Tensor:
        """One uniform number a row, float32 [B, 1], beside the noise of the draw: the same for the same seed and
        position. Samplers that need independent numbers take different streams, from 1."""
        return noise.uniform(self.seed, self.position, torch.zeros_like(self.seed), stream)

    def draw(self, logits: Tensor) -> Tensor:
        """Draws from softmax(logits), [B, V] -> [B], by the Gumbel-max trick with counter-based noise.

        A row where nothing can be drawn (NaN, +inf, or all masked) gives -1.
        """
        noisy = logits - noise.minus_gumbel(self.seed, self.position, self.ids)
        best, ids = top(noisy)  # not finite where no logit is, or one is NaN or +inf: the noise is finite
        return torch.where(best.abs() < torch.inf, ids, -1)


def top(scores: Tensor) -> tuple[Tensor, Tensor]:
    """max(dim=-1) of [B, V]: the largest scores and where they are, both [B].

    A CPU finds the largest of many much faster than its place, which is looked for in one block alone. So does what
    torch.compile makes for a GPU: inductor would join a search of whole rows with a sampler's cumulative sum, and then
    refuse that ("TritonSplitDimKernel", torch 2.11).
    """
    B, V = scores.shape
    if (scores.is_cuda and not torch.compiler.is_compiling()) or V % BLOCK:
        return scores.max(dim=-1)
    blocks = scores.reshape(B, V // BLOCK, BLOCK)
    best, block = blocks.amax(dim=-1).max(dim=-1, keepdim=True)  # [B, 1] each
    place = blocks.gather(1, block[:, :, None].expand(B, 1, BLOCK)).argmax(dim=-1)
    return best[:, 0], (block * BLOCK + place)[:, 0]

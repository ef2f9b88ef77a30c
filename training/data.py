"""Token arrays on the training device: random windows by source, and fixed held-out windows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.arrays import load_tokens
from training.schedule import SYNTHETIC

IGNORED = -100  # cross_entropy's ignore_index


def source_names(data_folder: Path) -> list[str]:
    """Sources of a prepared folder, in the order of its ``meta.json``."""
    content = json.loads((data_folder / "meta.json").read_text(encoding="utf-8"))
    return list(content["sources"])


def token_bytes(vocabulary: Path, entries: int) -> Tensor:
    """Length in bytes of every token, [V]; 0 for the end of text."""
    lengths = torch.zeros(entries, dtype=torch.long)
    for line in vocabulary.read_text(encoding="utf-8").splitlines():
        token, length = line.partition(" ")[0], line.rpartition(" ")[2]
        lengths[int(token)] = int(length)
    return lengths


@dataclass(frozen=True)
class Windows:
    """Training text of all sources in one tensor on the device, from which batches are gathered there."""

    names: list[str]
    tokens: Tensor  # [all tokens] int32
    first: Tensor  # [S] where each source begins
    size: Tensor  # [S] its tokens
    documents: Tensor  # [all documents] position of each id 0
    first_document: Tensor  # [S] where each source's documents begin in that
    document_count: Tensor  # [S]

    @classmethod
    def load(cls, data_folder: Path, device: torch.device, synthetic: Sequence[Path] = ()) -> Windows:
        """Read the training split of a prepared folder, and files of synthetic text as one more source."""
        names = source_names(data_folder)
        arrays = [load_tokens(data_folder / f"{name}.train.npy.xz").astype(np.int32) for name in names]
        if synthetic:
            names.append(SYNTHETIC)
            arrays.append(np.concatenate([np.load(path) for path in synthetic]).astype(np.int32))
        return cls.from_arrays(names, [torch.from_numpy(array) for array in arrays], device)

    @classmethod
    def from_arrays(cls, names: list[str], arrays: list[Tensor], device: torch.device) -> Windows:
        """Join one int32 token tensor for each source."""
        sizes = torch.tensor([len(array) for array in arrays])
        first = sizes.cumsum(0) - sizes
        pairs = zip(arrays, first, strict=True)
        starts = [(array == 0).nonzero().flatten() + offset for array, offset in pairs]
        counts = torch.tensor([len(positions) for positions in starts])
        parts = (torch.cat(arrays), first, sizes, torch.cat(starts), counts.cumsum(0) - counts, counts)
        return cls(names, *(part.to(device) for part in parts))

    def weights(self, mix: Mapping[str, float]) -> Tensor:
        """A mix as probabilities, [S].

        Raises:
            ValueError: the mix names a source that is not there.
        """
        unknown = set(mix) - set(self.names)
        if unknown:
            raise ValueError(f"unknown sources {sorted(unknown)}; there are {self.names}")
        weights = torch.tensor([mix.get(name, 0.0) for name in self.names], device=self.tokens.device)
        return weights / weights.sum()

    def batch(
        self, weights: Tensor, rows: int, length: int, at_start: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both [rows, length].

        The share ``at_start`` of windows starts with a document (its id 0), the others anywhere.
        """
        device = self.tokens.device
        source = torch.multinomial(weights, rows, replacement=True, generator=generator)  # [B]
        where = torch.rand(3, rows, generator=generator, device=device, dtype=torch.float64)
        room = self.size[source] - length - 1
        anywhere = self.first[source] + (where[0] * room).long()
        document = self.first_document[source] + (where[1] * self.document_count[source]).long()
        begin = torch.minimum(self.documents[document], self.first[source] + room)
        position = torch.where(where[2] < at_start, begin, anywhere)  # [B]
        window = self.tokens[position[:, None] + torch.arange(length + 1, device=device)].long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True)
class Heldout:
    """Fixed consecutive windows of the held-out text, every one read from a zero state."""

    names: list[str]
    windows: Tensor  # [W, T + 1], padded with IGNORED
    source: Tensor  # [W]
    bytes: Tensor  # [S] bytes of all targets

    @classmethod
    def load(cls, data_folder: Path, length: int, most: int, entries: int, device: torch.device) -> Heldout:
        """At most ``most`` windows of each source."""
        names = source_names(data_folder)
        spelled = token_bytes(data_folder / "vocab.txt", entries)
        windows, source, counts = [], [], []
        for index, name in enumerate(names):
            tokens = torch.from_numpy(load_tokens(data_folder / f"{name}.heldout.npy.xz").astype(np.int64))
            tokens = tokens[: most * length + 1]
            number = -((1 - len(tokens)) // length)
            padded = torch.full((number * length + 1,), IGNORED)
            padded[: len(tokens)] = tokens
            windows.append(padded.unfold(0, length + 1, length))
            source += [index] * number
            counts.append(int(spelled[tokens[1:]].sum()))
        parts = (torch.cat(windows), torch.tensor(source), torch.tensor(counts))
        return cls(names, *(part.to(device) for part in parts))

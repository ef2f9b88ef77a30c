"""Baselines for the held-out text: ``xz -9`` and an interpolated modified Kneser-Ney 5-gram over tokens.

Usage: ``python -m training.ngram DATA_FOLDER report.json``.

The n-gram model (Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3) is
trained on the whole training split and read exactly as the RWKV model is: documents one by one, id 0 before and after.
An n-gram of 12-bit tokens packs into 60 bits, so counts are sorted arrays of uint64.
"""

from __future__ import annotations

import argparse
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.arrays import load_tokens
from training.data import source_names, token_bytes

ORDER = 5
BITS = 12

Keys = npt.NDArray[np.uint64]
Reals = npt.NDArray[np.float64]


def packed(tokens: npt.NDArray[np.uint16], order: int) -> Keys:
    """Every n-gram as one number, [len(tokens) - order + 1]."""
    count = len(tokens) - order + 1
    keys = np.zeros(count, dtype=np.uint64)
    for offset in range(order):
        keys = (keys << np.uint64(BITS)) | tokens[offset : offset + count].astype(np.uint64)
    return keys


def found(sorted_keys: Keys, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Place of each key in a sorted array, and whether it is there."""
    place = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return place, sorted_keys[place] == keys


@dataclass(frozen=True)
class Level:
    """One order of the model: discounted counts of n-grams, and for each context its total and what was taken away."""

    grams: Keys
    discounted: Reals
    contexts: Keys
    totals: Reals
    freed: Reals

    @classmethod
    def of(cls, grams: Keys, counts: npt.NDArray[np.int64]) -> Level:
        """Modified Kneser-Ney discounts from the counts of counts."""
        n1, n2, n3, n4 = (max(1, int((counts == value).sum())) for value in (1, 2, 3, 4))
        base = n1 / (n1 + 2 * n2)
        by_count = np.array([0.0, 1 - 2 * base * n2 / n1, 2 - 3 * base * n3 / n2, 3 - 4 * base * n4 / n3])
        discounts = by_count.clip(min=0.0)[counts.clip(max=3)]
        # grams are sorted, so those of one context lie together
        contexts, first = np.unique(grams >> np.uint64(BITS), return_index=True)
        totals = np.add.reduceat(counts.astype(np.float64), first)
        return cls(grams, counts - discounts, contexts, totals, np.add.reduceat(discounts, first))

    def interpolate(self, keys: Keys, lower: Reals) -> Reals:
        """Probability of the last token of each n-gram after the others, given that of the next shorter order."""
        place, known = found(self.grams, keys)
        own = np.where(known, self.discounted[place], 0.0)
        place, known = found(self.contexts, keys >> np.uint64(BITS))
        total, freed = self.totals[place], self.freed[place]
        return np.where(known, (own + freed * lower) / total, lower)


def train_ngrams(tokens: npt.NDArray[np.uint16]) -> list[Level]:
    """Levels of order 1 to ORDER; all but the highest count in how many contexts an n-gram occurs."""
    levels: list[Level] = []
    grams, counts = np.unique(packed(tokens, ORDER), return_counts=True)
    for order in range(ORDER, 0, -1):
        levels.append(Level.of(grams, counts.astype(np.int64)))
        # Dropping the first token of each distinct n-gram leaves the shorter ones once for each left neighbour.
        mask = np.uint64((1 << (BITS * (order - 1))) - 1)
        grams, counts = np.unique(grams & mask, return_counts=True)
    return levels[::-1]


def ngram_bits(levels: list[Level], tokens: npt.NDArray[np.uint16], entries: int) -> float:
    """Bits of a held-out array; each document's first tokens see shorter contexts, back to its id 0."""
    starts = np.flatnonzero(tokens == 0)
    ended = np.append(tokens, np.uint16(0))  # the last document's end
    position = np.arange(1, len(ended))
    age = position - starts[np.searchsorted(starts, position, side="left") - 1]  # tokens since its id 0
    probability = np.full(len(position), 1.0 / entries)
    for order, level in enumerate(levels, start=1):
        reaching = position[age >= order - 1]
        keys = packed(ended, order)[reaching - order + 1]
        probability[reaching - 1] = level.interpolate(keys, probability[reaching - 1])
    return float(-np.log2(probability).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out baselines: xz and a 5-gram.")
    parser.add_argument("data", type=Path)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    names = source_names(arguments.data)
    entries = json.loads((arguments.data / "meta.json").read_text(encoding="utf-8"))["entries"]
    if entries > 1 << BITS:
        raise SystemExit(f"a vocabulary of {entries} does not fit {BITS} bits")
    levels = train_ngrams(np.concatenate([load_tokens(arguments.data / f"{n}.train.npy.xz") for n in names]))
    report: dict[str, dict[str, float]] = {}
    for name in names:
        tokens = load_tokens(arguments.data / f"{name}.heldout.npy.xz")
        text = decoded(arguments.data / "vocab.txt", tokens)
        count = int(token_bytes(arguments.data / "vocab.txt", entries).numpy()[tokens].sum())
        report[name] = {
            "ngram": ngram_bits(levels, tokens, entries) / count,
            "xz": 8 * len(lzma.compress(text, preset=9)) / len(text),
        }
        print(f"{name:22s} 5-gram {report[name]['ngram']:.3f}, xz -9 {report[name]['xz']:.3f}", flush=True)
    arguments.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def decoded(vocabulary: Path, tokens: npt.NDArray[np.uint16]) -> bytes:
    """The text of a token array, documents run together."""
    from rwkv_runtime.tokenizer import Tokenizer

    return Tokenizer.from_file(vocabulary).decode_bytes(tokens.tolist())


if __name__ == "__main__":
    main()

"""What sampled stories repeat: of the training text, and of themselves.

Usage: ``python -m training.originality stories.txt DATA_FOLDER report.json``.

For each story the longest run of words that stands in the training text, word for word and punctuation included, is
found by bisection over its length: polynomial hashes of all runs of one length are compared (64 bits, so a false match
among 30 million is a matter of 1 in 10^9; it could only make the reported run too long).  Repetition figures: the share
of distinct word n-grams, and the share of words that lie in a 6-gram that was already there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.arrays import load_tokens
from training.data import source_names

SEPARATOR = "<|endoftext|>"
LONGEST = 1024  # words

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class StoryFigures:
    """Figures of one story, in words; ``copied_text`` is its longest run that stands in the training text."""

    words: int
    copied: int
    copied_text: str
    distinct_2: float
    distinct_4: float
    repeated: float


def run_hashes(codes: Hashes, length: int) -> Hashes:
    """Hash of every run of ``length`` codes, [len(codes) - length + 1], joined from runs of powers of two."""
    if len(codes) < length:
        return np.empty(0, dtype=np.uint64)
    result, covered = np.zeros(len(codes) + 1, dtype=np.uint64), 0
    # One odd multiplier to the power of the run's length; arithmetic is modulo 2^64.
    power, span, runs = 0x9E3779B97F4A7C15, 1, codes
    while True:
        if length & span:
            count = len(codes) - covered - span + 1
            result = result[:count] * np.uint64(power) + runs[covered : covered + count]
            covered += span
        if covered == length:
            return result
        runs = runs[:-span] * np.uint64(power) + runs[span:]
        power, span = power * power % 2**64, 2 * span


def members(few: Hashes, many: Hashes) -> Hashes:
    """Those of a short sorted array that occur in a long one; the long one is never sorted."""
    place = np.searchsorted(few, many).clip(max=len(few) - 1)
    hit = np.zeros(len(few), dtype=bool)
    hit[place[few[place] == many]] = True
    return few[hit]


def copied_runs(training: Hashes, stories: list[Hashes]) -> list[tuple[int, int]]:
    """For each story the length of its longest run that stands in the training text, and where it begins."""
    best = [(0, 0)] * len(stories)
    low, high = [0] * len(stories), [LONGEST] * len(stories)
    while True:
        # All stories that ask for one length share one pass over the training text.
        wanted = [(a + b + 1) // 2 if a < b else 0 for a, b in zip(low, high, strict=True)]
        lengths = sorted(set(wanted) - {0})
        if not lengths:
            return best
        for length in lengths:
            asking = [index for index, value in enumerate(wanted) if value == length]
            hashes = [run_hashes(stories[index], length) for index in asking]
            known = np.unique(np.concatenate(hashes))
            present = members(known, run_hashes(training, length)) if len(known) else known
            for index, own in zip(asking, hashes, strict=True):
                places = np.flatnonzero(np.isin(own, present))
                if len(places):
                    low[index], best[index] = length, (length, int(places[0]))
                else:
                    high[index] = length - 1


def word_codes(texts: list[list[str]]) -> list[Hashes]:
    """A random-looking 64-bit code for each word, the same in all texts."""
    known: dict[str, int] = {}
    numbers = [np.array([known.setdefault(word, len(known)) for word in text], dtype=np.int64) for text in texts]
    table = np.random.default_rng(7).integers(0, 2**64, size=max(1, len(known)), dtype=np.uint64)
    return [table[number] for number in numbers]


def distinct(words: list[str], n: int) -> float:
    """Share of distinct n-grams; 1 for a text too short to have any."""
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(words: list[str], n: int = 6) -> float:
    """Share of words inside an n-gram that occurred before in the same text."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            inside[start : start + n] = [True] * n
        seen.add(gram)
    return sum(inside) / len(words) if words else 0.0


def examine(stories: list[str], training_text: str) -> list[StoryFigures]:
    """Figures of every story."""
    texts = [story.split() for story in stories]
    training, *coded = word_codes([training_text.split(), *texts])
    figures = []
    for words, (length, start) in zip(texts, copied_runs(training, coded), strict=True):
        figures.append(
            StoryFigures(
                len(words),
                length,
                " ".join(words[start : start + length]),
                distinct(words, 2),
                distinct(words, 4),
                repeated_share(words),
            )
        )
    return figures


def training_text(data_folder: Path) -> str:
    """The whole training split as text, documents separated by a word that no story holds."""
    from rwkv_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(data_folder / "vocab.txt")
    parts = []
    for name in source_names(data_folder):
        tokens = load_tokens(data_folder / f"{name}.train.npy.xz")
        for document in np.split(tokens, np.flatnonzero(tokens == 0))[1:]:
            parts.append(tokenizer.decode(document.tolist()))
    return f" {SEPARATOR} ".join(parts)


def summary(figures: list[StoryFigures]) -> dict[str, float]:
    """Means over stories, and quantiles of the copied runs."""
    copied = np.array([figure.copied for figure in figures])
    return {
        "stories": len(figures),
        "words": float(np.mean([figure.words for figure in figures])),
        "copied_median": float(np.median(copied)),
        "copied_90_per_cent": float(np.quantile(copied, 0.9)),
        "copied_longest": int(copied.max()),
        "distinct_2": float(np.mean([figure.distinct_2 for figure in figures])),
        "distinct_4": float(np.mean([figure.distinct_4 for figure in figures])),
        "repeated": float(np.mean([figure.repeated for figure in figures])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Copying and repetition of sampled stories.")
    parser.add_argument("stories", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    text = arguments.stories.read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split(f"{SEPARATOR}\n") if story.strip()]
    figures = examine(stories, training_text(arguments.data))
    content = {"summary": summary(figures), "stories": [asdict(figure) for figure in figures]}
    arguments.report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for key, value in content["summary"].items():  # type: ignore[attr-defined]
        print(f"{key:20s} {value:.4g}")


if __name__ == "__main__":
    main()

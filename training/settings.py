"""Which settings the story model reads best with: ``python -m training.settings [--stories N] [--output STORIES]``.

Writes stories as `rwkv-run` alone does, with the packaged model and the runtime's own engine, and prints a table of
how long they are, how many come to an end by themselves, and how much they repeat.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rwkv_runtime import Runtime, load
from rwkv_runtime.embedded import OPENING
from training.originality import SEPARATOR, distinct, repeated_share

SETTINGS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("nucleus", {"top_p": 0.5}),
    ("nucleus", {"top_p": 0.7}),
    ("nucleus", {"top_p": 0.8}),
    ("nucleus", {"top_p": 0.9}),
    ("nucleus", {"top_p": 0.95, "temperature": 0.8}),
    ("nucleus", {"top_p": 1.0}),
)


def stories(model: Runtime, count: int, sampler: str, params: Mapping[str, float], tokens: int = 512) -> list[str]:
    """Stories from the usual opening, seeds 0 to count - 1."""
    openings = [OPENING] * count
    texts = model.generate_batch(openings, sampler=sampler, rows=32, seed=0, max_tokens=tokens, **params)
    return [opening + text for opening, text in zip(openings, texts, strict=True)]


def row(texts: list[str]) -> str:
    """Cells of the table: words, ended by themselves, distinct 2- and 4-grams, share of words in a repeated 6-gram."""
    words = [text.split() for text in texts]
    ended = sum(text.rstrip().endswith((".", "!", "?", '"', "'")) for text in texts) / len(texts)
    means = [sum(values) / len(texts) for values in (map(len, words), (distinct(w, 2) for w in words))]
    means += [sum(distinct(w, 4) for w in words) / len(words), sum(repeated_share(w) for w in words) / len(words)]
    return f"| {means[0]:.0f} | {ended:.0%} | {means[1]:.3f} | {means[2]:.3f} | {means[3]:.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare sampler settings on the packaged story model.")
    parser.add_argument("--stories", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write stories at the default settings here, and no table")
    arguments = parser.parse_args()
    model = load()
    if arguments.output:
        texts = stories(model, arguments.stories, "nucleus", {})
        arguments.output.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in texts), encoding="utf-8")
        return
    print("| settings | words | ends in a sentence | distinct-2 | distinct-4 | repeated |")
    print("|---|---:|---:|---:|---:|---:|")
    for sampler, params in SETTINGS:
        label = ", ".join(f"{name} {value:g}" for name, value in params.items())
        print(f"| {sampler}: {label} {row(stories(model, arguments.stories, sampler, params))}", flush=True)


if __name__ == "__main__":
    main()

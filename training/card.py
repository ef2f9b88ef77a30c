"""Write the model card from the reports of the other commands.

Usage: ``python -m training.card RUN STORIES CARD``; RUN holds heldout.json, baselines.json and originality.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.originality import SEPARATOR

SHOWN = 10
HEAD = """# The story model

A small RWKV-6 (x060) language model that writes short stories in English: {parameters} million parameters, {layers}
layers of width {width} with heads of 64, bfloat16, {megabytes:.1f} MB, {vocabulary} byte-level tokens in
RWKV's format (id 0 ends a text). It was trained from nothing for rwkv-runtime, so that the runtime has something to
run at once and its tests have trained weights. It is a toy: it knows no facts, contradicts itself, and can only write
stories.

Licence: Apache-2.0.

## What it was trained on

| source | share | licence |
|---|---|---|
| GPT stories, written by gpt-4o-mini (Rettberg & Wigers 2025, doi 10.18710/VM2K4O) | most | CC0 |
| pieces of TinyStories (roneneldan/TinyStories), written by GPT-3.5 and GPT-4 | much | CDLA-Sharing-1.0 |
| ChiLit, 71 children's books of the 19th century (birmingham-ccr/corpora) | some | public domain |
| fairy tales from Project Gutenberg, by way of FairytaleQA | little | public domain |
| African Storybook and Pratham StoryWeaver, English picture books | little | CC-BY |
| texts begun as TinyStories' are, by two larger models that were trained on the above alone | much | Apache-2.0 |

Most of this text was itself written by a language model; its turns of phrase, its favourite names and its blind spots
are in this one too. The text is not part of the package.

One command in `training/README.md` reproduces the model. Held out, from the larger models too, is 1 % of the documents
of each source.

## How well it predicts held-out text

Bits per byte, whole documents, the state carried through each; beside it `xz -9` and an interpolated Kneser-Ney
5-gram over the same tokens, trained on the same text.

| source | this model | 5-gram | xz -9 |
|---|---:|---:|---:|
"""
COPYING = """
## What it repeats

Over {stories} stories at the default settings (seeds 0 to {last}, begun as `rwkv-run` alone begins), the longest run
of words of a story that stands word for word in the training text is {median:.0f} words at the median, {ninety:.0f} at
the 90th percentile and {longest} at most. The check accepted for shipping: a median of at most 20 words and no run over
50, two or three sentences. {distinct:.1%} of the 4-grams in a story are distinct, and {repeated:.2%} of its words lie
in a 6-gram it has used before.

## Ten stories

The first {shown} of those {stories}, unselected.
"""


def card(run: Path, stories: Path, facts: dict[str, object]) -> str:
    """The card's text."""
    heldout, baselines, originality = (
        json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("heldout", "baselines", "originality")
    )
    text = HEAD.format(**facts)
    for name, figures in sorted(heldout.items(), key=lambda item: item[1]["bits_per_byte"]):
        ngram, xz = baselines[name]["ngram"], baselines[name]["xz"]
        text += f"| {name} | {figures['bits_per_byte']:.3f} | {ngram:.3f} | {xz:.3f} |\n"
    summary = originality["summary"]
    text += COPYING.format(
        stories=summary["stories"],
        last=summary["stories"] - 1,
        median=summary["copied_median"],
        ninety=summary["copied_90_per_cent"],
        longest=summary["copied_longest"],
        distinct=summary["distinct_4"],
        repeated=summary["repeated"],
        shown=SHOWN,
    )
    written = stories.read_text(encoding="utf-8").split(f"{SEPARATOR}\n")[:SHOWN]
    for number, story in enumerate(written, start=1):
        lines = "\n".join(f"> {line}".rstrip() for line in story.strip().splitlines())
        text += f"\n{number}.\n\n{lines}\n"
    return text


def main() -> None:
    from rwkv_runtime import load

    parser = argparse.ArgumentParser(description="Write the story model's card.")
    parser.add_argument("run", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("card", type=Path)
    arguments = parser.parse_args()
    model = load().model
    size = Path(model.source).stat().st_size
    facts: dict[str, object] = {
        "parameters": f"{size / 2e6:.1f}",
        "layers": model.config.n_layer,
        "width": model.config.n_embd,
        "vocabulary": model.config.vocab_size,
        "megabytes": size / 1e6,
    }
    arguments.card.write_text(card(arguments.run, arguments.stories, facts), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What docs/sampling.md shows: the table of samplers, what each keeps, and how they repeat themselves.

python -m benchmarks.sampling_figures          # all of it, into docs/; needs matplotlib
python -m benchmarks.sampling_figures --table  # the table of samplers alone
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_runtime
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.sampler import Param
from rwkv_runtime.testing import distribution

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "sampling.md"
PLACES = {
    "sure": "Once upon a",
    "a few ways on": "Once upon a time, there was a little",
    "open": "They went to the",
}
KEEPERS = ["nucleus", "top-k", "top-p", "typical", "min-p", "epsilon", "eta", "top-n-sigma", "xtc", "mirostat"]
RIVALS: dict[str, dict[str, float]] = {
    "greedy": {},
    "standard": {},
    "nucleus": {},
    "top-k": {},
    "top-p": {},
    "typical": {},
    "min-p": {},
    "top-n-sigma": {},
    "xtc,min-p": {},
    "mirostat": {"mirostat_tau": 2.0},
    "penalties,min-p": {"repetition": 1.2},
    "rwkv-alpha,nucleus": {"alpha_presence": 0.4, "alpha_frequency": 0.4},
    "dry,min-p": {},
}
TEXTS, TOKENS = 16, 200
PROMPT = "Once upon a time"
Rate = tuple[str, float, float, float]


def sampler_table(plugins: Plugins) -> str:
    """Every built-in sampler with its parameters, as Markdown."""
    lines = ["| sampler | does | parameter | default | range | off |", "|---|---|---|---|---|---|"]
    for sampler in sorted(plugins.samplers, key=lambda s: s.name):
        head = f"| `{sampler.name}` | {sampler.summary} "
        for name, param in sampler.params.items():
            lines.append(f"{head}| `{name}`: {param.help} | {' | '.join(_facts(param))} |")
            head = "| | "
        if not sampler.params:
            lines.append(f"{head}| | | | |")
    return "\n".join(lines)


def _facts(param: Param) -> tuple[str, str, str]:
    """Default, range and neutral value."""

    def shown(value: float | str | None) -> str:
        if isinstance(value, str):
            return f"`{value!r}`" if value else "empty"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"

    span = "text" if isinstance(param.default, str) else f"{shown(param.low)} to {shown(param.high)}"
    return shown(param.default), span, shown(param.off)


def replace_part(text: str, name: str, new: str) -> str:
    """The page with what stands between the two comments of this name replaced."""
    begin, end = f"<!-- {name}: made by benchmarks/sampling_figures.py -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + "\n" + new + "\n\n" + end + rest.split(end)[1]


def kept_by_each(model: Any, plugins: Plugins) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """For each place in a text the probabilities [V], likeliest first, and what each sampler makes of them."""
    shown = {}
    for place, text in PLACES.items():
        logits = model.logits(model.tokenizer.encode(text))[-1]
        order = logits.argsort(descending=True)
        params = {"xtc": {"xtc_probability": 1.0}, "mirostat": {"mirostat_tau": 2.0}}
        kept = {name: distribution(plugins.sampler(name), logits, **params.get(name, {}))[0, order] for name in KEEPERS}
        shown[place] = torch.softmax(logits.double(), dim=-1)[order], kept
    return shown


def draw_kept(shown: dict[str, tuple[Tensor, dict[str, Tensor]]], path: Path) -> None:
    """Above, the distributions by rank; below, the ranks that each sampler keeps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(shown), figsize=(10, 5.2), sharex="col", height_ratios=[1, 1.6], layout="constrained"
    )
    for column, (place, (p, kept)) in enumerate(shown.items()):
        ranks = torch.arange(1, len(p) + 1)
        above, below = axes[:, column]
        above.loglog(ranks, p, color="0.3")
        above.set(title=f"{place}:\n“{PLACES[place]} …”", ylim=(1e-6, 1.5), xlim=(0.8, len(p) * 8))
        above.title.set_fontsize(9)
        for line, q in enumerate(kept.values()):
            some = q > 0
            below.scatter(ranks[some], torch.full((int(some.sum()),), line), s=14, marker="s", color=f"C{line}")
            below.text(len(p) * 1.5, line, f"{int(some.sum()):,}", va="center", fontsize=8)
        below.set(yticks=range(len(kept)), yticklabels=list(kept) if column == 0 else [], ylim=(len(kept) - 0.5, -0.5))
        below.set_xlabel("rank of the token")
    axes[0, 0].set_ylabel("probability")
    figure.savefig(path, dpi=90)


def repetition(model: Any) -> list[Rate]:
    """Each sampler's texts: how much of them was said before, and how varied they are."""
    rates = []
    for name, params in RIVALS.items():
        texts = model.generate_batch([PROMPT] * TEXTS, sampler=name, max_tokens=TOKENS, seed=1, rows=TEXTS, **params)
        tokens = [model.tokenizer.encode(text) for text in texts]
        label = name + "".join(f", {key} {value:g}" for key, value in params.items())
        rates.append((label, repeated(tokens, 4), distinct(tokens, 2), distinct(tokens, 4)))
    return rates


def grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of n-grams that their own text has had before."""
    each = [grams(text, n) for text in texts]
    return sum(len(every) - len({*every}) for every in each) / max(sum(map(len, each)), 1)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts together, as a share of all (Li et al., 2016)."""
    every = [gram for text in texts for gram in grams(text, n)]
    return len({*every}) / max(len(every), 1)


def repetition_table(rates: Sequence[Rate]) -> str:
    lines = ["| sampler | repeated 4-grams | distinct-2 | distinct-4 |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {100 * r:.1f} % | {two:.2f} | {four:.2f} |" for name, r, two, four in rates)]
    )


def draw_repetition(rates: Sequence[Rate], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    places = range(len(rates))
    left.barh(places, [100 * rate for _, rate, _, _ in rates], color="C3")
    left.set(xlabel="repeated 4-grams, %", yticks=places, yticklabels=[name.split(", ")[0] for name, *_ in rates])
    right.barh(places, [four for *_, four in rates], color="C0")
    right.set(xlabel=f"distinct-4 over {TEXTS} stories")
    left.invert_yaxis()
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str]) -> None:
    plugins = Plugins.load({"RWKV_PLUGINS": ""})
    page = replace_part(PAGE.read_text(encoding="utf-8"), "samplers", sampler_table(plugins))
    if "--table" not in arguments:
        (DOCS / "images").mkdir(exist_ok=True)
        model = rwkv_runtime.load(plugins=plugins, backend="eager", device="cpu", dtype="float32")
        draw_kept(kept_by_each(model, plugins), DOCS / "images" / "samplers-kept.png")
        rates = repetition(model)
        draw_repetition(rates, DOCS / "images" / "samplers-repetition.png")
        page = replace_part(page, "repetition", repetition_table(rates))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

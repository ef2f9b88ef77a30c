"""Plots of saved results; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import Record


class Plot(NamedTuple):
    """A case drawn across one number that was asked for; the name of its file says what."""

    case: str
    across: str
    up: str
    label: str
    name: str


PLOTS = (
    Plot("decode", "batch", "tokens_per_second", "tokens a second", "tokens-a-second-against-batch"),
    Plot("prefill", "length", "tokens_per_second", "tokens a second", "tokens-a-second-against-prompt-length"),
    Plot("decode", "batch", "read_share", "share of the read rate", "decode-share-of-the-limit"),
    Plot("prefill", "length", "matmul_share", "share of the matrix product rate", "prefill-share-of-the-limit"),
)
AXES = {"batch": "rows in the batch", "length": "tokens in the prompt"}


def draw(results: Sequence[Record], folder: Path, prefix: str) -> list[Path]:
    """One file for each plot and architecture; none for a case with no results."""
    made = []
    for plot in PLOTS:
        members = [r for r in results if r["case"] == plot.case]
        for architecture in sorted({r["architecture"] for r in members}):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{prefix}-{architecture}-{plot.name}.png"
            draw_one([r for r in members if r["architecture"] == architecture], plot, path)
            made.append(path)
    return made


def draw_one(members: Sequence[Record], plot: Plot, path: Path) -> None:
    """One line for each contestant and model; logarithmic upwards unless it is a share."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state of its own

    chart = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = chart.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in members:
        prompts = f", {r['prompts']} prompts" if r.get("prompts", 1) > 1 else ""
        name = f"{r['contestant']}, {r['size']} {r['dtype']}{prompts}"
        lines.setdefault(name, []).append((r[plot.across], r[plot.up]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ticks = sorted({r[plot.across] for r in members})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if plot.up == "tokens_per_second":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(AXES[plot.across])
    axes.set_ylabel(plot.label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
    chart.savefig(path, dpi=110)

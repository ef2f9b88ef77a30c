"""Draw loss and held-out bits per byte against steps.

Usage: ``python -m training.plot RUN_FOLDER/log.jsonl loss.png`` (or ``.svg``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log in the order of steps; what a resumed run did again replaces what was there."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("event") == "start":
            records = [kept for kept in records if kept["step"] <= record["step"]]
        records.append(record)
    return records


def plot(records: list[dict[str, Any]], output: Path) -> None:
    """Training loss above, held-out bits per byte below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    losses = [record for record in records if "loss" in record and "rate" in record]
    upper.plot([r["step"] for r in losses], [r["loss"] for r in losses], linewidth=0.8)
    upper.set_ylabel("training loss (nats a token)")
    later = [r["loss"] for r in losses[len(losses) // 50 :]]  # the first falls would flatten the rest
    upper.set_ylim(min(later) - 0.05, max(later) + 0.05)
    heldout = [record for record in records if record.get("heldout")]
    for name in heldout[0]["heldout"] if heldout else ():
        lower.plot([r["step"] for r in heldout], [r["heldout"][name] for r in heldout], marker=".", label=name)
    lower.set_ylabel("held-out bits per byte")
    lower.set_xlabel("step")
    lower.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        for record in records:
            if record.get("event") == "decay begins":
                axes.axvline(record["step"], color="grey", linestyle=":")
    figure.savefig(output, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot a training log.")
    parser.add_argument("log", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    plot(read_log(arguments.log), arguments.output)


if __name__ == "__main__":
    main()

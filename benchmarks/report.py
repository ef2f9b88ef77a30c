"""`python -m benchmarks.report FILE.json... [--output docs/benchmarks.md]`: saved results as a page, with plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
"""What one benchmark stored in its extra_info."""

PACKAGE = "rwkv package"
HEADINGS = {
    "decode": "Decode: tokens a second",
    "prefill": "Prefill: tokens of the prompt a second",
    "generate": "Generate, with engine and sampling: tokens a second",
    "sampling": "Sampling from 65,536 logits: draws a second",
    "tokenizer encode": "Tokenizer: MB encoded a second",
    "tokenizer decode": "Tokenizer: MB decoded a second",
    "tokenizer load": "Vocabulary: ms to load",
    "load": "Checkpoint: ms to load, from the system's file cache",
    "start": "Start: seconds of a fresh process up to its first token",
}
INTRODUCTION = """\
Written by `python -m benchmarks.report` from what `pytest benchmarks --benchmark-json=FILE.json` saved.
All programs ran the same random weights in the same process; their logits were checked before anything was timed.
In brackets: how many times as fast as the `rwkv` package, the median of rounds run in turn with its own. Of a limit:
the share of the machine's measured read rate (decode) or matrix product rate (prefill). Absolute figures are this
machine's, on that day.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(argv)
    runs = [json.loads(path.read_text()) for path in options.files]
    results = [b["extra_info"] for run in runs for b in run["benchmarks"] if "case" in b["extra_info"]]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    images = options.output.parent / "images"
    plots = draw(results, images) if find_spec("matplotlib") else []
    options.output.write_text(page(runs, results, [f"{images.name}/{plot.name}" for plot in plots]))


def page(runs: Sequence[Mapping[str, Any]], results: Sequence[Result], plots: Iterable[str] = ()) -> str:
    """The document, in Markdown."""
    parts = ["# Benchmarks", INTRODUCTION]
    if any(r["smoke"] for r in results):
        parts.append("**From a smoke run: it shows that everything runs; the figures mean nothing.**")
    parts += [machine(run["machine_info"].get("rwkv_runtime", {})) for run in runs]
    ceilings = [r for r in results if r["case"] == "ceiling"]
    if ceilings:
        rows = [[r["contestant"], f"{r['rate']:,.2f} {r['unit']}"] for r in ceilings]
        parts.append("## What the machine can do\n\n" + table(["limit", "best"], rows))
    for case, heading in HEADINGS.items():
        members = [r for r in results if r["case"] == case]
        if members:
            parts.append(f"## {heading}\n\n{comparison(members)}")
    flags = [f"- {r['case']} {where(r)}, {r['contestant']}: {r['flag']}" for r in results if "flag" in r]
    if flags:
        parts.append("## Above a limit\n\nThese need an explanation before they are believed.\n\n" + "\n".join(flags))
    parts += [f"![{Path(plot).stem.replace('-', ' ')}]({plot})" for plot in plots]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def machine(info: Mapping[str, Any]) -> str:
    """Where a run took place, and the command that made it."""
    versions = ", ".join(f"{name} {number}" for name, number in info.get("versions", {}).items())
    lines = [
        f"- {info.get('cpu_model', 'unknown CPU')}, {info.get('cores', '?')} cores, {info.get('threads', '?')} threads"
        f" ({', '.join(info.get('cpu_flags', ())) or 'flags unknown'}), load {info.get('load_average', 0):.1f}",
        f"- Python {info.get('python', '?')}, {versions}",
        f"- `{info.get('command', 'pytest benchmarks')}`",
    ]
    if "gpu" in info:
        lines.insert(1, f"- {info['gpu']}, {info['gpu_memory_gb']} GB, CUDA {info['cuda']}")
    return "\n".join(lines)


def comparison(members: Sequence[Result]) -> str:
    """One row for each setting, one column for each contestant; the package comes last."""
    names = sorted(dict.fromkeys(r["contestant"] for r in members), key=lambda name: name == PACKAGE)
    by_setting: dict[str, dict[str, Result]] = {}
    for r in members:
        by_setting.setdefault(where(r), {})[r["contestant"]] = r
    rows = [
        [setting, *(figure(found[name]) if name in found else "" for name in names)]
        for setting, found in by_setting.items()
    ]
    return table(["", *names], rows)


def where(r: Result) -> str:
    """What was asked of all contestants alike."""
    parts = [str(r[name]) for name in ("size", "dtype") if name in r]
    parts += [f"{name} {r[name]}" for name in ("batch", "length") if name in r]
    return " ".join([*parts, r["device"]])


def figure(r: Result) -> str:
    """One cell."""
    if r["case"] == "start":
        cold = f"; {r['cold_first_token']:.1f} with an empty compiler cache" if r["contestant"] == "compile" else ""
        return f"{r['ms_p50'] / 1e3:.1f}, {r['peak_gb']:.1f} GB{cold}"
    value = next((r[name] for name in ("tokens_per_second", "megabytes_per_second") if name in r), None)
    text = f"{r['ms_p50']:,.0f} ms" if r["case"] == "load" or value is None else number(value)
    notes = []
    if r["ratio_to_package"] is not None and r["contestant"] != PACKAGE:
        notes.append(f"{r['ratio_to_package']:.2f}x")
    share = r.get("read_share", r.get("matmul_share"))
    if share is not None:
        notes.append(f"{share:.0%} of the limit")
    return f"{text} ({', '.join(notes)})" if notes else text


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Plots of the figures that depend on a number, one file each; none for a case with no results."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = (
        ("decode", "batch", "tokens_per_second", "tokens a second", "tokens-a-second-against-batch.png"),
        ("prefill", "length", "tokens_per_second", "tokens a second", "tokens-a-second-against-prompt-length.png"),
        ("decode", "batch", "read_share", "share of the read rate", "decode-share-of-the-limit.png"),
        ("prefill", "length", "matmul_share", "share of the matrix product rate", "prefill-share-of-the-limit.png"),
    )
    made = []
    for case, across, up, label, name in plots:
        members = [r for r in results if r["case"] == case]
        if members:
            draw_one(members, across, up, label, folder / name)
            made.append(folder / name)
    return made


def draw_one(members: Sequence[Result], across: str, up: str, label: str, path: Path) -> None:
    """One line for each contestant and model."""
    from matplotlib.figure import Figure  # not pyplot, which keeps state of its own

    chart = Figure(figsize=(7, 4), layout="constrained")
    axes = chart.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in members:
        lines.setdefault(f"{r['contestant']}, {r['size']} {r['dtype']}", []).append((r[across], r[up]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ticks = sorted({r[across] for r in members})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows in the batch" if across == "batch" else "tokens in the prompt")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    chart.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

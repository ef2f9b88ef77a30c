"""`python -m benchmarks.report FILE.json... [--output docs/benchmarks.md]`: saved results as a page, with plots."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.results import Machine, Record, read
from benchmarks.targets import PACKAGE, cpu_targets, gpu_targets

HEADINGS = {
    "decode": "Decode: tokens a second",
    "prefill": "Prefill: tokens of the prompts a second",
    "generate": "Generate, with engine and sampling: tokens a second",
    "sampling share": "Sampling: what nucleus takes of a step of one row",
    "sampling": "Sampling from 65,536 logits: draws a second",
    "tokenizer encode": "Tokenizer: MB encoded a second",
    "tokenizer decode": "Tokenizer: MB decoded a second",
    "tokenizer load": "Vocabulary: ms to load",
    "load": "Checkpoint: ms to load, from the system's file cache",
    "start": "Start: seconds of a fresh process up to its first token; reading the weights was measured apart",
    "overhead": "Engine: what of a token's time is beyond its step, forward pass and sampling; embedded model, one row",
    "growth": "Growth: a step after a long context against one after 100 tokens, embedded model, one row",
}
WIDE = 10
"""Most columns of a table."""
INTRODUCTION = """\
Written by `python -m benchmarks.report benchmarks/results/*.json` from what `pytest benchmarks --results FILE.json`
saved; runs with other settings add to a file. `python -m benchmarks.suite FOLDER --seconds 540` makes `results.json`
there, with the parts of the protocol in order of importance for this machine, GPU or CPU; `--part NAME` makes one.

All programs of a run had the same random weights in the same process; their logits were checked before anything was
timed. In brackets: how many times as fast as the `rwkv` package, the median of rounds run in turn with its own. Of
the limit: the share of the machine's measured read rate (decode; a plain step moves every matrix once and the state of
each row twice, in full) or matrix product rate (prefill), as that run measured it; the table of limits shows the last
run's, and rows of the others may be of several. A p99 is of steps on a CPU, on a GPU of rounds of up to 16.
Absolute figures are that machine's, on that day: on a shared one they vary, the ratios much less.
"""


ABOVE = """\
Above a limit by more than a tenth a figure is not to be believed. By less: on a CPU the read rate is the best of
torch's own ways to read, none of which asks for memory ahead of time as `native` and llama.cpp do; and on a shared
machine the rate is another one by the time the step is measured. On a GPU `fused` moves less than what counts: of one
row or two it does not read the rows of the value matrix whose inputs are zero, half of them with random weights; of 32
rows or more of RWKV-6 it reads states in 16 bits and writes them at every eighth step."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    images = options.output.parent / "images"
    sections = []
    for machine in read(options.files):
        plots = draw(machine.results, images, slug(machine.info)) if find_spec("matplotlib") else []
        sections.append(section(machine, [f"{images.name}/{plot.name}" for plot in plots]))
    options.output.write_text("\n\n".join(["# Benchmarks", INTRODUCTION.strip(), *sections]) + "\n")


def section(machine: Machine, plots: Iterable[str] = ()) -> str:
    """All about one machine, in Markdown."""
    results = machine.results
    parts = [f"## {name(machine.info)}", about(machine)]
    if any(r["smoke"] for r in results):
        parts.append("**From a smoke run: it shows that everything runs; the figures mean nothing.**")
    ceilings = [r for r in results if r["case"] == "ceiling"]
    if ceilings:
        rows = [[r["contestant"], f"{r['rate']:,.2f} {r['unit']}"] for r in ceilings]
        parts.append("### What the machine can do\n\n" + table(["limit", "median"], rows))
    parts.append(f"### Target and reached\n\n{aims(machine)}")
    for case, heading in HEADINGS.items():
        members = [r for r in results if r["case"] == case]
        if members:
            parts.append(f"### {heading}\n\n{comparison(members)}")
    parts += [f"### Where the engine's own time goes: {r['contestant']}\n\n{profile(r)}" for r in profiled(results)]
    flags = [f"- {r['case']} {where(r)}, {r['contestant']}: {r['flag']}" for r in results if "flag" in r]
    if flags:
        parts.append(f"### Above a limit\n\n{ABOVE}\n\n" + "\n".join(flags))
    parts += [f"![{Path(plot).stem.replace('-', ' ')}]({plot})" for plot in plots]
    return "\n\n".join(part.strip() for part in parts)


def name(info: Record) -> str:
    return str(info.get("gpu") or info.get("cpu_model") or "unknown CPU")


def slug(info: Record) -> str:
    """The machine's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name(info).lower()).strip("-")


def about(machine: Machine) -> str:
    """Where the runs took place, and the commands that made them."""
    info = machine.info
    versions = ", ".join(f"{package} {number}" for package, number in info.get("versions", {}).items())
    lines = [
        f"- {info.get('cpu_model', 'unknown CPU')}, {info.get('cores', '?')} cores, {info.get('threads', '?')} threads"
        f" ({', '.join(info.get('cpu_flags', ())) or 'flags unknown'}), load {info.get('load_average', 0):.1f}",
        f"- Python {info.get('python', '?')}, {versions}",
        f"- `rwkv` package: {info.get('rwkv_package', 'unknown')}",
        *(f"- `{command}`" for command in machine.commands),
    ]
    if "gpu" in info:
        gpu = f"- {info['gpu']}, {info['gpu_memory_gb']} GB, CUDA {info['cuda']}"
        lines.insert(1, ", ".join([gpu, *(f"{key} {value}" for key, value in info.get("clocks", {}).items())]))
    return "\n".join(lines)


def aims(machine: Machine) -> str:
    """What was to be reached, what was and by whom, whether that is enough; and what was not measured."""
    rows, unknown = [], []
    for target in gpu_targets() if "gpu" in machine.info else cpu_targets():
        reached = target.find(machine.results)
        if reached is None:
            unknown.append(f"{target.what} ({target.aim()})")
        else:
            met, figure = target.met(reached.value), target.form.format(reached.value)
            if not met and figure in target.aim():  # what is missing shows only in a digit more
                figure = re.sub(r"\.(\d)", lambda digits: f".{int(digits[1]) + 1}", target.form).format(reached.value)
            rows.append([target.what, target.aim(), f"{figure} ({reached.who})", "yes" if met else "no"])
    parts = [table(["", "target", "reached", ""], rows)] if rows else []
    if unknown:
        parts.append(f"Not measured on this machine: {'; '.join(unknown)}.")
    return "\n\n".join(parts)


def comparison(members: Sequence[Record]) -> str:
    """One row for each setting, one column for each contestant, the package last; turned round where too wide."""
    names = sorted(dict.fromkeys(r["contestant"] for r in members), key=lambda name: name == PACKAGE)
    by_setting: dict[str, dict[str, Record]] = {}
    for r in members:
        by_setting.setdefault(where(r), {})[r["contestant"]] = r
    cells = [[figure(found[name]) if name in found else "" for name in names] for found in by_setting.values()]
    if len(names) > WIDE:
        columns = zip(*cells, strict=True)
        return table(["", *by_setting], [[name, *column] for name, column in zip(names, columns, strict=True)])
    return table(["", *names], [[setting, *row] for setting, row in zip(by_setting, cells, strict=True)])


def where(r: Record) -> str:
    """What was asked of all contestants alike."""
    parts = [str(r[key]) for key in ("architecture", "size", "dtype") if key in r]
    parts += [f"{key} {r[key]}" for key in ("batch", "prompts", "length", "context") if key in r]
    return " ".join([*parts, r["device"]])


def figure(r: Record) -> str:
    """One cell."""
    case = r["case"]
    if case == "start":
        steps = {name: r[f"warm_{name}"] for name in ("imports", "reading") if f"warm_{name}" in r}
        steps["the rest"] = r["warm_first_token"] - sum(steps.values())
        alone = {"imports": f" (torch alone {r['torch_alone']:.1f})"} if "torch_alone" in r else {}
        parts = ", ".join(f"{name} {seconds:.1f}{alone.get(name, '')}" for name, seconds in steps.items())
        text = f"{r['ms_p50'] / 1e3:.1f} ({parts})"
        cold = f"; {r['cold_first_token']:.1f} with empty caches" if "cold_first_token" in r else ""
        return f"{text}, {r['peak_gb']:.1f} GB{cold}"
    if case == "overhead":
        host = f"; the host's own {r['host_us']:.0f} us a token" if "host_us" in r else ""
        return f"{r['share_outside']:.1%} of {r['ms_p50']:.2f} ms{host}"
    if case == "sampling share":
        return f"{r['sampling_share']:.1%} of {r['ms_p50']:.2f} ms"
    if case == "growth":
        return f"{r['growth']:.2f}x; {r['grown_mb']:+.1f} MB while {r['written']:,} more were written"
    value = next((r[key] for key in ("tokens_per_second", "megabytes_per_second") if key in r), None)
    text = f"{r['ms_p50']:,.0f} ms" if case == "load" or value is None else number(value)
    notes = []
    if r["ratio_to_package"] is not None and r["contestant"] != PACKAGE:
        notes.append(f"{r['ratio_to_package']:.2f}x")
    share = r.get("read_share", r.get("matmul_share"))
    if share is not None:
        notes.append(f"{share:.0%} of the limit")
    if case == "decode":
        notes.append(f"p99 {r['ms_p99']:.1f} ms")
    return f"{text} ({', '.join(notes)})" if notes else text


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def profiled(results: Sequence[Record]) -> list[Record]:
    """The result with the least time outside the forward pass, of each device: the others' engine is the same."""
    members = sorted((r for r in results if r["case"] == "overhead"), key=lambda r: (r["device"], r["share_outside"]))
    return [next(found) for _, found in groupby(members, key=lambda r: str(r["device"]))]


def profile(r: Record) -> str:
    rows = [[f"`{function}`", f"{calls:.1f}", f"{own:.1f}"] for function, calls, own in r["profile"]]
    note = "Without the steps' forward pass and sampling; with the profiler's own time, tenths of a microsecond a call."
    return f"{note}\n\n" + table(["function", "calls a step", "own microseconds a step"], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()

"""The results of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from benchmarks.arena import Arena

Line = tuple[str, bool]
"""Text, and whether it is a warning."""


def lines(arena: Arena) -> Iterator[Line]:
    """The ceilings, then each group with this runtime beside the others."""
    best = arena.ceilings.best
    yield from ((f"{name:<18}{rate:12.2f} {arena.ceilings.units[name]}", False) for name, rate in best.items())
    if arena.settings.smoke:
        yield "A smoke run: it shows that everything runs; its figures mean nothing.", False
    records = sorted((r for r in arena.records if r["case"] != "ceiling"), key=lambda r: str(r["group"]))
    for group, members in groupby(records, key=lambda r: str(r["group"])):
        yield "", False
        yield f"{group:<46}{'ms p50':>10}{'p99':>10}{'rate':>21}{'of limit':>10}{'x package':>11}", False
        for member in members:
            yield row(member), False
            if "flag" in member:
                yield f"  ! {member['contestant']}: {member['flag']}", not arena.settings.smoke


def row(r: dict[str, Any]) -> str:
    share = r.get("read_share", r.get("matmul_share"))
    ratio = r["ratio_to_package"]
    return (
        f"  {r['contestant']:<44}{r['ms_p50']:10.3f}{r['ms_p99']:10.3f}{rate(r):>21}"
        f"{'' if share is None else f'{share:.0%}':>10}{'' if ratio is None else f'{ratio:.2f}':>11}"
    )


def rate(r: dict[str, Any]) -> str:
    """The figure a reader looks for, with its unit."""
    for name, text in (("share_outside", "outside"), ("sampling_share", "sampling"), ("growth", "of a short one")):
        if name in r:
            return f"{r[name]:.1%} {text}"
    for name, unit in (("tokens_per_second", "tok/s"), ("megabytes_per_second", "MB/s"), ("peak_gb", "GB peak")):
        if name in r:
            return f"{r[name]:,.1f} {unit}"
    return ""

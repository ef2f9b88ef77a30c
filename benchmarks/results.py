"""Results on disk: what `pytest benchmarks --results FILE` writes and the report reads.

A file holds runs, each with its machine, its command and its figures; another run with the same file adds to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
"""What one benchmark found out."""


@dataclass
class Results:
    """The results of this run, written with every new one; without a path they are not kept."""

    path: Path | None
    machine: Record
    command: str
    records: list[Record] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)
    """Runs that the file held already."""

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            self.before = json.loads(self.path.read_text())["runs"]

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self.path is None:
            return
        run = {"machine": self.machine, "command": self.command, "results": self.records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"runs": [*self.before, run]}, indent=1) + "\n")
        partial.replace(self.path)  # whole or not at all, whenever the run is stopped


@dataclass(frozen=True)
class Machine:
    """All that was measured on one machine: of two results of the same thing, the later."""

    info: Record
    commands: list[str]
    results: list[Record]


def read(paths: Iterable[Path]) -> list[Machine]:
    """The machines of all files, in the order in which they first come."""
    found: dict[tuple[Any, ...], tuple[Record, list[str], dict[tuple[Any, ...], Record]]] = {}
    for path in paths:
        for run in json.loads(path.read_text())["runs"]:
            info = run["machine"]
            # A GPU's host is the same one however many threads it used.
            threads = None if info.get("gpu") else info.get("threads")
            key = (threads, *(info.get(name) for name in ("cpu_model", "cores", "gpu", "device")))
            earlier, commands, results = found.setdefault(key, (info, [], {}))
            # The load is the last run's; of what that run did not have, a peer say, the version is an earlier one's.
            versions = {**earlier.get("versions", {}), **info.get("versions", {})}
            found[key] = ({**info, "versions": versions}, commands, results)
            if run["command"] not in commands:
                commands.append(run["command"])
            results |= {_key(record): record for record in run["results"]}
    return [Machine(info, commands, list(results.values())) for info, commands, results in found.values()]


SETTING = ("architecture", "size", "dtype", "batch", "prompts", "length", "context")
"""What was asked of all contestants alike."""


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("case", "contestant", *SETTING))


def setting(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in SETTING)

"""--prompts: many prompts from a JSONL file through one batch; an interrupted run is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import click
from tqdm import tqdm

from rwkv_runtime.cli.run import INTERRUPTED, Session, outcome
from rwkv_runtime.errors import OptionError, RwkvError
from rwkv_runtime.generation import Generation, Request

FIELDS = ("prompt", "id", "max_tokens", "seed", "stop", "seconds")
MAX_LINE = 16 << 20


def run_batch(session: Session) -> None:
    """Writes one JSON line for each input line as it is finished; `line` says which (from 1).

    A line that cannot be used gets a record with `error` and costs only itself.
    """
    source, target = Path(session.options["prompts"]), Path(session.options["output"])
    total = _count_lines(source)
    done = _taken_up(target, source)
    engine = session.engine
    pending: dict[Generation, tuple[int, bytes, dict[str, Any]]] = {}
    failed = 0
    with (
        open(target, "a", encoding="utf-8") as output,
        tqdm(
            total=total, initial=len(done), unit="prompt", disable=None if not session.options["quiet"] else True
        ) as bar,
    ):

        def put(number: int, raw: bytes, record: dict[str, Any]) -> None:
            record = {"line": number, "of": _digest(raw), **record}
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
            bar.update()

        lines = ((n, raw) for n, raw in _lines(source) if n not in done)
        try:
            while True:
                while len(pending) < 2 * engine.rows and (line := next(lines, None)) is not None:
                    try:
                        request, extra = _request(session, *line)
                        pending[engine.submit(request)] = (*line, extra)
                    except RwkvError as error:
                        failed += 1
                        put(*line, {"error": str(error)})
                if not pending:
                    break
                engine.step()
                for generation in [g for g in pending if g.finish is not None]:
                    number, raw, extra = pending.pop(generation)
                    failed += generation.error is not None
                    put(number, raw, extra | outcome(generation))
        except KeyboardInterrupt:
            for generation in pending:
                engine.cancel(generation)
            click.echo(f"\ninterrupted; the same command takes up the rest of {source}", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
    if failed:
        click.echo(f"{failed} of {total} lines failed; their records in {target} say why", err=True)
        raise click.exceptions.Exit(1)


def _request(session: Session, number: int, raw: bytes) -> tuple[Request, dict[str, Any]]:
    """The request of one line, and what its record repeats. Raises OptionError with what is wrong with the line."""
    if len(raw) > MAX_LINE:
        raise OptionError(f"the line is longer than {MAX_LINE} bytes")
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"not JSON: {error}") from None
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise OptionError('a line is a string or an object with "prompt"')
    request = session.request(entry["prompt"], session.seed + number - 1)
    params = {name: value for name, value in entry.items() if name not in FIELDS}
    changes: dict[str, Any] = {"params": {**session.params, **params}}
    for name in ("max_tokens", "seed"):
        if name in entry:
            if type(entry[name]) is not int:
                raise OptionError(f"{name} is a whole number, not {entry[name]!r}")
            changes[name] = entry[name]
    if "seconds" in entry:
        if not isinstance(entry["seconds"], int | float) or not entry["seconds"] > 0:
            raise OptionError(f"seconds is a number above 0, not {entry['seconds']!r}")
        changes["seconds"] = entry["seconds"]
    if "stop" in entry:
        stops = [entry["stop"]] if isinstance(entry["stop"], str) else entry["stop"]
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise OptionError("stop is a string or a list of strings")
        changes["stop"] = tuple(stops)
    repeated = {name: entry[name] for name in ("id", "prompt") if name in entry}
    return replace(request, **changes), repeated


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, blank ones left out."""
    with _open(source) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw.strip()


def _open(source: Path) -> IO[bytes]:
    try:
        return open(source, "rb")
    except OSError as error:
        raise OptionError(f"--prompts {source}: {error.strerror}") from None


def _count_lines(source: Path) -> int:
    return sum(1 for _ in _lines(source))


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _taken_up(target: Path, source: Path) -> set[int]:
    """Numbers of the lines an earlier run has finished; a record it was writing when it was stopped is cut off.

    Raises OptionError where the output is of another input.
    """
    if not target.exists():
        return set()
    digests = {number: _digest(raw) for number, raw in _lines(source)}
    done: set[int] = set()
    with open(target, "r+b") as file:
        end = 0
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                record = json.loads(raw)
                number, digest = record["line"], record["of"]
            except (ValueError, TypeError, KeyError):
                raise OptionError(f"--output {target}: line {len(done) + 1} is not a record of rwkv-run") from None
            if digests.get(number) != digest:
                raise OptionError(f"--output {target}: its records are of another input than {source}; name a new file")
            done.add(number)
            end += len(raw)
        file.seek(end)
        file.truncate()
        os.fsync(file.fileno())
    return done

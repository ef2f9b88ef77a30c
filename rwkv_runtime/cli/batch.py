"""--prompts: many prompts from a JSONL file through one batch; an interrupted run is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

import click
from tqdm import tqdm

from rwkv_runtime.cli.command import INTERRUPTED
from rwkv_runtime.cli.explain import as_record
from rwkv_runtime.cli.interrupts import deferred
from rwkv_runtime.cli.lock import lock
from rwkv_runtime.cli.run import Session, outcome
from rwkv_runtime.errors import OptionError, RwkvError
from rwkv_runtime.generation import Generation, Request

FIELDS = ("prompt", "id", "max_tokens", "seed", "stop", "seconds")
MAX_LINE = 16 << 20
BEGINNING = b'{"line": '
"""What every record begins with."""


def check_files(options: Mapping[str, Any]) -> None:
    """Raises OptionError where --prompts cannot be read or --output cannot be written; changes nothing."""
    source, target = Path(options["prompts"]), Path(options["output"])
    _check_source(source)
    _check_target(target, source)
    _earlier(target, source, _digests(source))


def run_batch(session: Session) -> None:
    """Writes one JSON line for each input line as it is finished; `line` says which (from 1).

    A line that cannot be used gets a record with `error` and costs only itself.
    """
    source, target = Path(session.options["prompts"]), Path(session.options["output"])
    digests = _digests(source)
    hidden = True if session.options["quiet"] else None  # None: hidden unless on a terminal
    with deferred() as interrupted, open(target, "ab") as output:
        _claim(output, target)
        done, end = _earlier(target, source, digests)
        output.truncate(end)
        lines = ((number, raw) for number, raw in _lines(source) if number not in done)
        with tqdm(total=len(digests), initial=len(done), unit="prompt", leave=False, disable=hidden) as bar:
            batch = _Batch(session, output, bar)
            finished = batch.run(lines, interrupted)
    if not finished:
        so_far = f"{len(done) + batch.written} of {len(digests)} lines done"
        click.echo(f"interrupted, {so_far}; the same command takes up the rest of {source}", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    failed = batch.failed + sum(done.values())
    summary = f"{failed} of {len(digests)} lines failed; their records in {target} say why"
    if not failed:
        summary = f"{len(digests)} of {len(digests)} lines done; their records are in {target}"
    if not session.options["quiet"]:
        click.echo(f"{summary} {batch.figures()}".rstrip(), err=True)
    elif failed:
        click.echo(summary, err=True)
    if failed:
        raise click.exceptions.Exit(1)


class _Batch:
    """Lines on their way through the engine, and the file their records go to."""

    def __init__(self, session: Session, output: IO[bytes], bar: tqdm[NoReturn]) -> None:
        self.session, self.output, self.bar = session, output, bar
        self.pending: dict[Generation, tuple[int, bytes, dict[str, Any]]] = {}
        self.written = self.failed = self.tokens = 0
        self.started = time.perf_counter()

    def run(self, lines: Iterator[tuple[int, bytes]], interrupted: Callable[[], bool]) -> bool:
        """Takes a line or makes a step, in turn, until all is written; False where Ctrl-C came first."""
        engine = self.session.engine
        while not interrupted():
            line = next(lines, None) if len(self.pending) < 2 * engine.rows else None
            if line is not None:
                self._take(*line)
            elif self.pending:
                engine.step()
                self._write_finished()
            else:
                return True
        for generation in self.pending:
            engine.cancel(generation)
        return False

    def figures(self) -> str:
        """What this run wrote until now, for a person; nothing where it wrote nothing."""
        rate = self.tokens / (time.perf_counter() - self.started)
        figures = f"[wrote {self.tokens} tokens, {rate:.1f}/s | {self.session.runtime.backend.name}]"
        return figures if self.tokens else ""

    def _take(self, number: int, raw: bytes) -> None:
        try:
            request, repeated = _request(self.session, number, raw)
            self.pending[self.session.engine.submit(request)] = (number, raw, repeated)
        except RwkvError as error:
            self._put(number, raw, {"error": str(error)})

    def _write_finished(self) -> None:
        for generation in [g for g in self.pending if g.finish is not None]:
            number, raw, repeated = self.pending.pop(generation)
            record = repeated | outcome(generation)
            if self.session.options["logprobs"]:
                tokenizer = self.session.runtime.tokenizer
                record["logprobs"] = [as_record(o, tokenizer) for o in generation.observations]
            self._put(number, raw, record)

    def _put(self, number: int, raw: bytes, record: dict[str, Any]) -> None:
        self.written += 1
        self.failed += "error" in record
        self.tokens += record.get("tokens", 0)
        text = json.dumps({"line": number, "of": _digest(raw), **record}, ensure_ascii=False) + "\n"
        self.output.write(text.encode("utf-8", "backslashreplace"))  # \ud800 is JSON's own way to write it
        self.output.flush()
        self.bar.update()


def _request(session: Session, number: int, raw: bytes) -> tuple[Request, dict[str, Any]]:
    """The request of one line, and what its record repeats. Raises OptionError with what is wrong with the line."""
    entry = _entry(raw)
    request = session.request(entry["prompt"], session.seed + number - 1)
    params = {name: value for name, value in entry.items() if name not in FIELDS}
    changes: dict[str, Any] = {"params": {**session.params, **params}}
    for name in ("max_tokens", "seed"):
        if name in entry:
            if type(entry[name]) is not int:
                raise OptionError(f"{name} is a whole number, not {entry[name]!r}")
            changes[name] = entry[name]
    if "seconds" in entry:
        seconds = entry["seconds"]
        if type(seconds) not in (int, float) or seconds <= 0:
            raise OptionError(f"seconds is a number above 0, not {seconds!r}")
        changes["seconds"] = seconds
    if "stop" in entry:
        stops = [entry["stop"]] if isinstance(entry["stop"], str) else entry["stop"]
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise OptionError("stop is a string or a list of strings")
        changes["stop"] = tuple(stops)
    repeated: dict[str, Any] = {name: entry[name] for name in ("id", "prompt") if name in entry}
    return replace(request, **changes), repeated


def _entry(raw: bytes) -> dict[str, Any]:
    """One line as an object with a prompt, its names spelt with "_". Raises OptionError."""
    if len(raw) > MAX_LINE:
        raise OptionError(f"the line is longer than {MAX_LINE} bytes")
    try:
        entry = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()  # its record repeats parts of it
    except UnicodeEncodeError:
        raise OptionError("half of a surrogate pair is no text") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"not JSON: {error}") from None
    if isinstance(entry, str):
        return {"prompt": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise OptionError('a line is a string or an object with "prompt"')
    return {name.replace("-", "_"): value for name, value in entry.items()}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _check_source(source: Path) -> None:
    try:
        regular = stat.S_ISREG(source.stat().st_mode)
    except OSError as error:
        raise OptionError(f"--prompts {source}: {error.strerror}") from None
    if not regular:
        raise OptionError(f"{source} is no regular file; --prompts reads its file twice; write it to a file first")
    if not os.access(source, os.R_OK):
        raise OptionError(f"--prompts {source}: cannot be read")


def _check_target(target: Path, source: Path) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise OptionError(f"--output {target}: there is no folder {target.parent}") from None
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OptionError(f"--output {target}: its folder cannot be written to") from None
        return
    except OSError as error:
        raise OptionError(f"--output {target}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise OptionError(f"--output {target}: a directory, not a file")
    if not stat.S_ISREG(mode):
        raise OptionError(f"--output {target}: not a regular file")
    if target.samefile(source):
        raise OptionError(f"--output {target}: the file of --prompts; name another one")
    if not os.access(target, os.R_OK | os.W_OK):
        raise OptionError(f"--output {target}: cannot be read and written")
    with open(target, "r+b") as file:
        _claim(file, target, warn=False)


def _claim(file: IO[bytes], target: Path, warn: bool = True) -> None:
    """Raises OptionError where another run is writing the file: each would write records that the other has."""
    try:
        claimed = lock(file)
    except OSError as error:
        claimed = True
        if warn:
            click.echo(f"warning: {target} cannot be locked ({error.strerror}); let no other run write it", err=True)
    if not claimed:
        raise OptionError(f"--output {target}: another rwkv-run is writing it; wait for that, or name another file")


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1, blank ones left out."""
    with open(source, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw.strip()


def _digests(source: Path) -> dict[int, str]:
    """What tells each line from another in its place."""
    return {number: _digest(raw) for number, raw in _lines(source)}


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _earlier(target: Path, source: Path, digests: Mapping[int, str]) -> tuple[dict[int, bool], int]:
    """Lines an earlier run has finished, and whether each failed; and where its last whole record ends.

    What follows there is a record it was writing when it was stopped. Raises OptionError for any other content.
    """
    done: dict[int, bool] = {}
    end = 0
    if not target.exists():
        return done, end
    with open(target, "rb") as file:
        for place, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n") and (raw.startswith(BEGINNING) or BEGINNING.startswith(raw)):
                break
            try:
                record = json.loads(raw)
                number, same = record["line"], digests.get(record["line"]) == record["of"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise OptionError(f"--output {target}: line {place} is not a record of rwkv-run") from None
            if not same:
                raise OptionError(f"--output {target}: its records are of another input than {source}; name a new file")
            done[number] = "error" in record
            end += len(raw)
    return done, end

"""From options to text: what every mode of rwkv-run shares, and the plain one."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import click
import torch

from rwkv_runtime import collector
from rwkv_runtime.cli.checks import check, read_prompt
from rwkv_runtime.cli.command import INTERRUPTED, WrongUsage, echo_json, nothing_to_lose
from rwkv_runtime.cli.elsewhere import of_use
from rwkv_runtime.cli.explain import as_record, table
from rwkv_runtime.cli.figures import Figures
from rwkv_runtime.cli.interrupts import follow
from rwkv_runtime.cli.progress import loading
from rwkv_runtime.embedded import OPENING
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError, RwkvError
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.loading import load, load_plugins
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.snapshot import Snapshot

CANDIDATES = 8
"""Candidates that --explain shows, unless --logprobs says how many."""


def run(options: Mapping[str, Any]) -> None:
    """Carries out one invocation. What goes wrong becomes one line on stderr."""
    _listen(options["quiet"])
    try:
        if options["table"]:
            from rwkv_runtime.cli.tables import show

            show(options["table"], Plugins.load(), options["as_json"])
        else:
            _dispatch(options)
    except OptionError as error:
        raise WrongUsage(str(error)) from None
    except RwkvError as error:
        raise click.ClickException(str(error)) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise click.ClickException("out of memory; try fewer --rows, a smaller --dtype or another --device") from None


def _listen(quiet: bool) -> None:
    """Shows the warnings of all, and what the runtime and its plugins say of themselves, on stderr."""

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            serious = record.levelno > logging.INFO
            return f"{record.levelname.lower()}: {record.getMessage()}" if serious else record.getMessage()

    handler = logging.StreamHandler()
    handler.setFormatter(Plain())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("rwkv_runtime").setLevel(logging.WARNING if quiet else logging.INFO)


def _dispatch(options: Mapping[str, Any]) -> None:
    with nothing_to_lose():
        plugins = load_plugins()
    options = of_use(options, plugins)
    check(options, plugins)
    if options["prompts"]:
        from rwkv_runtime.cli.batch import run_batch

        run_batch(Session.open(options, plugins, rows=options["rows"]))
    elif options["chat"]:
        from rwkv_runtime.cli.chat import chat

        chat(Session.open(options, plugins))
    else:
        prompt = read_prompt(options)
        if prompt is None:
            prompt = "" if options["model"] or options["load_state"] else OPENING
        write(Session.open(options, plugins), prompt)


@dataclass
class Session:
    """A loaded model and what the options say about writing with it."""

    options: Mapping[str, Any]
    runtime: Runtime
    engine: Engine
    params: Mapping[str, object]
    start: Snapshot | None
    seed: int

    @classmethod
    @nothing_to_lose()
    @collector.lasting()
    def open(cls, options: Mapping[str, Any], plugins: Plugins, rows: int = 1) -> Session:
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        with loading() as progress:
            runtime = load(
                options["model"],
                backend=options["backend"],
                dtype=options["dtype"],
                device=options["device"],
                vocab=options["vocab"],
                sha256=options["sha256"],
                quant=options["quant"],
                state_dtype=options["state_dtype"],
                plugins=plugins,
                progress=progress,
            )
        start = None
        if options["load_state"]:
            from rwkv_runtime.snapshot import load_snapshot

            start = load_snapshot(options["load_state"], runtime.model)
        seed = random.getrandbits(32) if options["seed"] is None else options["seed"]
        return cls(options, runtime, runtime.engine(options["sampler"], rows), options["params"], start, seed)

    def request(self, prompt: str, seed: int) -> Request:
        options = self.options
        return Request(
            prompt=self.runtime.tokenizer.encode(prompt),
            params=self.params,
            max_tokens=options["max_tokens"],
            seed=seed,
            stop=options["stop"],
            seconds=options["seconds"],
            start=self.start,
            observe=options["logprobs"] or (CANDIDATES if options["explain"] else 0),
        )

    def save(self, snapshot: Snapshot | None) -> None:
        """Saves the state where --save-state says; a text that failed, or whose prompt was not read, has none."""
        if not self.options["save_state"]:
            return
        if snapshot is None:
            click.echo(f"warning: no state was saved to {self.options['save_state']}", err=True)
            return
        from rwkv_runtime.snapshot import save_snapshot

        save_snapshot(snapshot, self.options["save_state"])

    def report(self, generation: Generation, prompt: str) -> None:
        """Figures on stderr, or with --json the whole record on stdout."""
        if self.options["quiet"] and not self.options["as_json"]:
            return
        figures = Figures.of(generation, self.engine)
        if self.options["as_json"]:
            record = {"prompt": prompt, **outcome(generation), "figures": figures.as_dict()}
            if self.options["logprobs"] and not self.options["explain"]:
                record["logprobs"] = [as_record(o, self.runtime.tokenizer) for o in generation.observations]
            echo_json(record)
        else:
            click.echo(f"[{figures.line()} | seed {generation.request.seed} | {self.runtime.backend.name}]", err=True)


def outcome(generation: Generation) -> dict[str, Any]:
    """What a text came to, for JSON."""
    return {
        "text": generation.text,
        "finish": generation.finish,
        "tokens": len(generation.tokens),
        "seed": generation.request.seed,
        **({"error": str(generation.error)} if generation.error else {}),
    }


def write(session: Session, prompt: str) -> None:
    """One prompt, one text or several; the prompt is read once."""
    options = session.options
    show = _explain if options["explain"] else _write_record if options["as_json"] else _write_text
    restart: Snapshot | None = None
    for trial in range(options["trials"]):
        request = replace(session.request(prompt, session.seed + trial), keep=True)
        if restart is not None:
            request = replace(request, prompt=(), start=restart)
        generation = session.engine.submit(request)
        show(session, generation, prompt)
        if isinstance(generation.error, OptionError):
            raise generation.error
        restart = restart or generation.prompt_snapshot
        session.report(generation, prompt)
        last = generation.finish in ("cancelled", "error") or trial == options["trials"] - 1
        if last:
            session.save(generation.snapshot)
        if generation.error:
            raise generation.error
        if generation.finish == "cancelled":
            raise click.exceptions.Exit(INTERRUPTED)


def _write_text(session: Session, generation: Generation, prompt: str) -> None:
    """The prompt is shown with the first token: until then the line belongs to a bar or to a refusal."""
    unshown = prompt if session.options["echo"] else ""
    for piece in follow(session.engine, generation):
        if generation.tokens:
            click.echo(unshown + piece, nl=False)
            unshown = ""
    if not isinstance(generation.error, OptionError):
        click.echo()


def _write_record(session: Session, generation: Generation, prompt: str) -> None:
    """Nothing while it is written; `report` gives the record."""
    for _ in follow(session.engine, generation):
        continue


def _explain(session: Session, generation: Generation, prompt: str) -> None:
    """Every step with its candidates, then the text."""
    tokenizer, shown = session.runtime.tokenizer, 0
    for _ in follow(session.engine, generation):
        for observation in generation.observations[shown:]:
            shown += 1
            if session.options["as_json"]:
                echo_json({"step": shown, **as_record(observation, tokenizer)})
            else:
                click.echo(f"{shown}. {table(observation, tokenizer)}")
    if not session.options["as_json"] and generation.observations:
        click.echo((prompt if session.options["echo"] else "") + generation.text)

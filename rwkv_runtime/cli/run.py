"""From options to text: what every mode of rwkv-run shares, and the plain one."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import click
import torch

from rwkv_runtime.cli.explain import as_record, table
from rwkv_runtime.cli.figures import Figures
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError, RwkvError
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import AUTO, Runtime, load, load_plugins, parse_device, parse_dtype
from rwkv_runtime.sampler import check_params
from rwkv_runtime.snapshot import Snapshot

INTERRUPTED = 130
CANDIDATES = 8
"""Candidates that --explain shows, unless --logprobs says how many."""


class WrongUsage(click.ClickException):
    """One line, as every other error, but with the exit status of wrong usage."""

    exit_code = 2


def run(options: Mapping[str, Any]) -> None:
    """Carries out one invocation. Every RwkvError becomes one line on stderr."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    try:
        if options["table"]:
            from rwkv_runtime.cli.tables import show

            show(options["table"], Plugins.load(), options["as_json"])
            return
        _dispatch(options)
    except OptionError as error:
        raise WrongUsage(str(error)) from None
    except RwkvError as error:
        raise click.ClickException(str(error)) from None


def _dispatch(options: Mapping[str, Any]) -> None:
    plugins = load_plugins()
    params = _check(options, plugins)
    if options["prompts"]:
        from rwkv_runtime.cli.batch import run_batch

        run_batch(Session.open(options, plugins, params, rows=options["rows"]))
    elif options["chat"]:
        from rwkv_runtime.cli.chat import chat

        chat(Session.open(options, plugins, params))
    else:
        prompt = _read_prompt(options)
        write(Session.open(options, plugins, params), prompt)


def _check(options: Mapping[str, Any], plugins: Plugins) -> dict[str, object]:
    """Refuses what is wrong before a model is loaded; returns the sampler's parameters as given."""
    if options["backend"] != AUTO:
        plugins.backends.get(options["backend"])
    params: dict[str, object] = {name.replace("-", "_"): value for name, value in options["option"]}
    for name in ("temperature", "top_p", "top_k"):
        if options[name] is not None:
            params[name] = options[name]
    check_params(plugins.sampler(options["sampler"]), params)
    parse_device(options["device"])
    parse_dtype(options["dtype"])
    if options["logprobs"] and not (options["as_json"] or options["explain"]):
        raise OptionError("--logprobs goes with --json or --explain")
    modes = [mode for mode in ("chat", "prompts") if options[mode]]
    if len(modes) > 1:
        raise OptionError("--chat and --prompts exclude each other")
    if modes and (options["prompt"] is not None or options["prompt_file"]):
        raise OptionError(f"--{modes[0]} takes no prompt")
    if options["prompts"] and not options["output"]:
        raise OptionError("--prompts needs --output FILE")
    if options["output"] and not options["prompts"]:
        raise OptionError("--output goes with --prompts; to keep a single text, redirect standard output")
    if options["prompts"] and (options["load_state"] or options["save_state"]):
        raise OptionError("--load-state and --save-state are for one text, not for --prompts")
    return params


def _read_prompt(options: Mapping[str, Any]) -> str:
    if options["prompt"] is not None and options["prompt_file"]:
        raise OptionError("give the prompt as an argument or by --file, not both")
    if options["prompt"] not in (None, "-"):
        return str(options["prompt"])
    try:
        if options["prompt_file"]:
            return str(options["prompt_file"].read())
        return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt is not UTF-8 (byte {error.start})") from None


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
    def open(cls, options: Mapping[str, Any], plugins: Plugins, params: Mapping[str, object], rows: int = 1) -> Session:
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        with _progress() as progress:
            runtime = load(
                options["model"],
                backend=options["backend"],
                dtype=options["dtype"],
                device=options["device"],
                vocab=options["vocab"],
                sha256=options["sha256"],
                plugins=plugins,
                progress=progress,
            )
        start = None
        if options["load_state"]:
            from rwkv_runtime.snapshot import load_snapshot

            start = load_snapshot(options["load_state"], runtime.model)
        seed = random.getrandbits(32) if options["seed"] is None else options["seed"]
        return cls(options, runtime, runtime.engine(options["sampler"], rows), params, start, seed)

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
        """Saves the state where --save-state says; a text that failed has none."""
        if self.options["save_state"] and snapshot is not None:
            from rwkv_runtime.snapshot import save_snapshot

            save_snapshot(snapshot, self.options["save_state"])

    def report(self, generation: Generation, prompt: str) -> None:
        """Figures on stderr, or with --json the whole record on stdout."""
        figures = Figures.of(generation, self.engine)
        if self.options["as_json"]:
            record = {"prompt": prompt, **outcome(generation), "figures": figures.as_dict()}
            if self.options["logprobs"] and not self.options["explain"]:
                record["logprobs"] = [as_record(o, self.runtime.tokenizer) for o in generation.observations]
            click.echo(json.dumps(record, ensure_ascii=False))
        elif not self.options["quiet"]:
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
    restart: Snapshot | None = None
    for trial in range(options["trials"]):
        request = replace(session.request(prompt, session.seed + trial), keep=True)
        if restart is not None:
            request = replace(request, prompt=(), start=restart)
        generation = session.engine.submit(request)
        interrupted = (explain if options["explain"] else _show)(session, generation, prompt)
        restart = restart or generation.prompt_snapshot
        session.report(generation, prompt)
        if interrupted or generation.error or trial == options["trials"] - 1:
            session.save(generation.snapshot)
        if generation.error:
            raise generation.error
        if interrupted:
            raise click.exceptions.Exit(INTERRUPTED)


def _show(session: Session, generation: Generation, prompt: str) -> bool:
    """Streams the text to stdout; True where the user ended it with Ctrl-C."""
    silent = session.options["as_json"]
    if session.options["echo"] and not silent:
        click.echo(prompt, nl=False)
    interrupted = False
    try:
        for piece in session.engine.stream(generation):
            if not silent:
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        interrupted = True
    except RwkvError:
        if generation.error is None:
            raise
    if not silent:
        click.echo("".join(generation.pieces))  # what Ctrl-C left untaken, and the last newline
    return interrupted


def explain(session: Session, generation: Generation, prompt: str) -> bool:
    """Shows every step instead of the text; True where the user ended it with Ctrl-C."""
    tokenizer, shown = session.runtime.tokenizer, 0
    try:
        while generation.finish is None:
            session.engine.step()
            for observation in generation.observations[shown:]:
                if session.options["as_json"]:
                    click.echo(json.dumps({"step": shown + 1, **as_record(observation, tokenizer)}, ensure_ascii=False))
                else:
                    click.echo(f"{shown + 1}. {table(observation, tokenizer)}")
                shown += 1
    except KeyboardInterrupt:
        session.engine.cancel(generation)
        return True
    if not session.options["as_json"]:
        click.echo(prompt + generation.text)
    return False


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal while a large model loads; nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc="loading", unit="weights", unit_scale=True, delay=0.5, leave=False, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update

"""--chat: turn by turn, in one of the models' prompt formats."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace

import click

from rwkv_runtime.cli.formats import FORMATS
from rwkv_runtime.cli.run import Session
from rwkv_runtime.errors import RwkvError
from rwkv_runtime.generation import Generation
from rwkv_runtime.snapshot import RECENT, Snapshot

STOP = "\n\nUser:"
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"


def clean(message: str) -> str:
    """A message as the World models were trained on it: LF line ends, no blank lines, no space around it."""
    return re.sub(r"\n{2,}", "\n", message.replace("\r\n", "\n").replace("\r", "\n")).strip()


def chat(session: Session) -> None:
    """Reads messages from standard input until it ends, and writes the answers to standard output."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  (line editing for input())
        click.echo(HELP, err=True)
    snapshot, said = session.start, ""
    form = FORMATS[session.options["chat_format"]]
    turn = 0
    while (message := _ask(interactive)) is not None:
        if message == "/exit":
            break
        if message == "/reset":
            snapshot, said = session.start, ""
            continue
        if not message:
            continue
        between = "\n\n" if snapshot is not None else ""
        prompt = f"{said}{between}{form.prompt(message)}"
        generation = _answer(session, snapshot, prompt, session.seed + turn, form.opening.lstrip())
        snapshot = generation.prompt_snapshot or snapshot
        said = form.answer(clean(generation.text))  # read again with the next message, without the stop string
        session.report(generation, message)
        turn += 1
    session.save(_read_on(session, snapshot, said))


def _ask(interactive: bool) -> str | None:
    """The next message, or None at the end."""
    try:
        if interactive:
            click.echo("\nUser: ", nl=False, err=True)
            return clean(input())
        line = sys.stdin.readline()
        return clean(line.replace("\\n", "\n")) if line else None
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None


def _answer(session: Session, start: Snapshot | None, prompt: str, seed: int, opening: str) -> Generation:
    request = session.request(prompt, seed)
    request = replace(request, start=start, stop=(*request.stop, STOP), keep=True)
    generation = session.engine.submit(request)
    silent, begun = session.options["as_json"], bool(opening)
    if not silent:
        click.echo(opening, nl=False)
    try:
        for piece in session.engine.stream(generation):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            if not silent:
                click.echo(shown, nl=False)
    except KeyboardInterrupt:
        if not silent:
            click.echo("".join(generation.pieces), nl=False)
    except RwkvError as error:
        if generation.error is None:
            raise
        click.echo(f"error: {error}", err=True)
    if not silent:
        click.echo()
    return generation


def _read_on(session: Session, snapshot: Snapshot | None, said: str) -> Snapshot | None:
    """The conversation's state with the last answer read, to be saved."""
    if snapshot is None or not session.options["save_state"]:
        return None
    tokens = [*snapshot.pending, *session.runtime.tokenizer.encode(said)]
    state = snapshot.state
    if tokens[:-1]:
        _, state = session.runtime.forward(tokens[:-1], state)
    recent = (*snapshot.recent, *tokens[:-1])[-RECENT:]
    return Snapshot(state, (tokens[-1],), snapshot.position + len(tokens) - 1, recent)

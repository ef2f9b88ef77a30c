"""--chat: turn by turn, in one of the models' prompt formats."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace

import click

from rwkv_runtime.cli.command import INTERRUPTED
from rwkv_runtime.cli.formats import FORMATS
from rwkv_runtime.cli.interrupts import deferred, follow
from rwkv_runtime.cli.run import Session
from rwkv_runtime.errors import OptionError
from rwkv_runtime.generation import Generation
from rwkv_runtime.snapshot import RECENT, Snapshot

STOP = "\n\nUser:"
HELP = "/reset or /clear forgets the conversation, /exit or Ctrl-D leaves, /help shows this, Ctrl-C ends an answer"
COMMAND = re.compile(r"/[\w-]*")
"""One word behind a slash: a path or a sentence is for the model."""


def clean(message: str) -> str:
    """A message as the World models were trained on it: LF line ends, no blank lines, no space around it."""
    return re.sub(r"\n{2,}", "\n", message.replace("\r\n", "\n").replace("\r", "\n")).strip()


def chat(session: Session) -> None:
    """Reads messages from standard input until it ends, and writes the answers to standard output.

    The state is saved however it ends.
    """
    interactive = sys.stdin is not None and sys.stdin.isatty()
    conversation = Conversation(session)
    try:
        if interactive:
            with contextlib.suppress(ImportError):  # Windows has no readline
                import readline  # noqa: F401  (line editing for input())
            click.echo(HELP, err=True)
        while _exchange(conversation, interactive):
            continue
    finally:
        with deferred():  # Ctrl-C once more does not lose the state
            session.save(conversation.read_on())


def _exchange(conversation: Conversation, interactive: bool) -> bool:
    """One message and what is done about it; False at the end."""
    try:
        message = _ask(interactive)
        if message is None or message == "/exit":
            return False
        if message in ("/reset", "/clear"):
            conversation.forget()
        elif COMMAND.fullmatch(message):
            click.echo(HELP if message == "/help" else f"there is no command {message}; {HELP}", err=True)
        elif message:
            finish = conversation.turn(message).finish
            if finish == "cancelled" and not interactive:
                raise click.exceptions.Exit(INTERRUPTED)
    except KeyboardInterrupt:
        if not interactive:
            raise
        click.echo(f"\n{HELP}", err=True)
    return True


def _ask(interactive: bool) -> str | None:
    """The next message, or None at the end."""
    if not interactive:
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        try:
            return clean(line.decode("utf-8-sig")) if line else None
        except UnicodeDecodeError as error:
            raise OptionError(f"a message is not UTF-8 (byte {error.start + 1})") from None
    click.echo(err=True)
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    if not on_terminal:
        click.echo("User: ", nl=False, err=True)  # input() would write it among the answers
    try:
        return clean(input("User: " if on_terminal else ""))  # line editing redraws the prompt that it is given
    except EOFError:
        click.echo(err=True)
        return None


class Conversation:
    """What has been read, `snapshot`, and the last answer, `said`, which is read with the next message.

    The answer is read again as it is remembered: cleaned, and without the stop string.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.form = FORMATS[session.options["chat_format"]]
        self.turns = 0
        self.forget()

    def forget(self) -> None:
        self.snapshot, self.said = self.session.start, ""

    def turn(self, message: str) -> Generation:
        """Answers a message, and remembers both unless it ends before all of the message is read."""
        between = "\n\n" if self.snapshot is not None else ""
        request = self.session.request(
            f"{self.said}{between}{self.form.prompt(message)}", self.session.seed + self.turns
        )
        request = replace(request, start=self.snapshot, stop=(*request.stop, STOP), keep=True)
        self.turns += 1
        generation = self.session.engine.submit(request)
        try:
            self._show(generation)
        finally:
            self.session.engine.cancel(generation)  # a second Ctrl-C or a broken pipe leaves it unfinished
            if generation.prompt_snapshot is not None:
                self.snapshot, self.said = generation.prompt_snapshot, self.form.answer(clean(generation.text))
        if isinstance(generation.error, OptionError):  # so would every other turn
            raise generation.error
        self.session.report(generation, message)
        return generation

    def _show(self, generation: Generation) -> None:
        """The opening is shown with the first token, as the prompt of a single text is."""
        silent, unshown = self.session.options["as_json"], self.form.opening.lstrip()
        begun = bool(unshown)
        for piece in follow(self.session.engine, generation):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            if not silent and generation.tokens:
                click.echo(unshown + shown, nl=False)
                unshown = ""
        if isinstance(generation.error, OptionError):
            return
        if not silent:
            click.echo()
        if generation.error:
            click.echo(f"error: {generation.error}", err=True)

    def read_on(self) -> Snapshot | None:
        """The conversation's state with the last answer read, to be saved."""
        snapshot, runtime = self.snapshot, self.session.runtime
        if snapshot is None or not self.said or not self.session.options["save_state"]:
            return snapshot
        tokens = [*snapshot.pending, *runtime.tokenizer.encode(self.said)]
        state = snapshot.state
        if tokens[:-1]:
            _, state = runtime.forward(tokens[:-1], state)
        recent = (*snapshot.recent, *tokens[:-1])[-RECENT:]
        return Snapshot(state, (tokens[-1],), snapshot.position + len(tokens) - 1, recent)

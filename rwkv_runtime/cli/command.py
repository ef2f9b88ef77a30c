"""The shape of the command: errors in one line, whoever raises them."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from textwrap import shorten
from typing import Any

import click

from rwkv_runtime.cli.options import SEE_HELP
from rwkv_runtime.errors import did_you_mean

INTERRUPTED = 130
WRONG_USAGE = 2


@contextlib.contextmanager
def nothing_to_lose() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once: as an exception it could be swallowed by a library being imported."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda signum, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def echo_json(record: Mapping[str, Any]) -> None:
    """One line of JSON on standard output, in ASCII where that has no other characters."""
    unicode = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name.startswith("utf")
    click.echo(json.dumps(record, ensure_ascii=not unicode))


class WrongUsage(click.ClickException):
    """A name or value that cannot be right."""

    exit_code = WRONG_USAGE


class OneLineCommand(click.Command):
    """A command whose errors are one line on stderr: exit status 1, 2 for wrong usage, 130 for Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except click.ClickException as error:
            message = " ".join(self._message(error).split())
            click.echo(f"Error: {message}", err=True)
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has left
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            click.echo(f"Error: {error.filename or 'output'}: {error.strerror}", err=True)
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's, which would only say that there is one argument too many."""
        ctx.allow_extra_args = True
        if extra := super().parse_args(ctx, args):
            prompt = shorten(" ".join([ctx.params["prompt"], *extra]), 60, placeholder=" ...")
            raise click.UsageError(f'the prompt is one argument; put it in quotes: rwkv-run "{prompt}"', ctx)
        return extra

    def _message(self, error: click.ClickException) -> str:
        """What went wrong; for a misspelt option, the nearest one and no other."""
        if not isinstance(error, click.NoSuchOption):
            return error.format_message()
        spelt = [
            name for param in self.get_params(click.Context(self)) for name in (*param.opts, *param.secondary_opts)
        ]
        known = [name.removeprefix("--") for name in spelt if name.startswith("--")]
        name = error.option_name.lstrip("-").replace("_", "-")
        return f"there is no option {error.option_name}; {did_you_mean(name, known, SEE_HELP, prefix='--')}"

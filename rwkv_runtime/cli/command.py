"""The shape of the command: errors in one line, whoever raises them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

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
            message = " ".join(error.format_message().split())
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

"""rwkv-run with a tiny model: in this process, or in one of its own that Ctrl-C can reach."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from helpers import byte_tokenizer
from safetensors.torch import save_file

from rwkv_runtime import Plugins
from rwkv_runtime.cli import command

CODE = "from rwkv_runtime.cli import main; main()"


def save_tiny_model(folder: Path) -> Path:
    """A tiny model with a vocabulary of bytes beside it."""
    architecture = Plugins.load().architectures.get("rwkv6")
    tensors = architecture.random(architecture.sizes(2, 64, 257, head_size=32), seed=3)
    tensors["head.weight"][0] = tensors["head.weight"][1:].mean(0)  # end of text is never likely
    save_file(tensors, folder / "tiny.safetensors")
    byte_tokenizer().to_file(folder / "tiny.vocab.txt")
    return folder / "tiny.safetensors"


def rwkv_run(model: Path, *args: str, input: str | bytes = "") -> Result:
    env = {name: None for name in os.environ if name.startswith("RWKV_")}
    return CliRunner().invoke(command, [*args, "--model", str(model)], input=input, env=env)


@contextlib.contextmanager
def at_a_terminal(model: Path, *args: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process whose standard streams are a terminal, and our end of that; POSIX alone."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # a bar needs some room
    process = started(model, *args, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def shown_at(terminal: int) -> bytes:
    """All that is shown until the process has left."""
    shown = b""
    with contextlib.suppress(OSError):  # on Linux the end of a terminal is an error
        while piece := os.read(terminal, 65536):
            shown += piece
    return shown


def started(model: Path, *args: str, **streams: Any) -> subprocess.Popen[bytes]:
    """A process of its own, quick to write, whose standard streams are pipes unless told otherwise."""
    options = ["--model", str(model), "--backend", "eager", "--threads", "1", *args]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RWKV_")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", CODE, *options],
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job's may be ignored
        **pipes | streams,
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it is so; the process must not end before."""
    limit = time.monotonic() + 60
    while not what():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)

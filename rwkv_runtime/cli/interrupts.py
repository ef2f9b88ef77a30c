"""Ctrl-C between two steps, never inside one: a state is saved whole or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rwkv_runtime.cli.progress import reading
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Generation


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function true; a second one interrupts at once."""
    seen = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield seen.is_set
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def follow(engine: Engine, generation: Generation) -> Iterator[str]:
    """The text of a request as it comes; Ctrl-C cancels it between two steps. How it ended is in the generation."""
    with deferred() as interrupted, reading(generation) as progress:
        while generation.pieces or generation.finish is None:
            if interrupted():
                engine.cancel(generation)
            if generation.pieces:
                yield generation.pieces.popleft()
            elif generation.finish is None:
                engine.step()
                progress()
                yield ""  # the caller may look at what was observed

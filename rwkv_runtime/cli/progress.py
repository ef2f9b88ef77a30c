"""Bars on a terminal while something takes long, gone when it is done; nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

from rwkv_runtime.checkpoint import Progress
from rwkv_runtime.generation import Generation


@contextlib.contextmanager
def loading() -> Iterator[Progress]:
    """While a large model is loaded."""
    with tqdm(desc="loading", unit="weights", unit_scale=True, delay=0.5, leave=False, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextlib.contextmanager
def reading(generation: Generation) -> Iterator[Callable[[], None]]:
    """While a long prompt is read; gone before the first piece of text is there to be shown."""
    total = len(generation.feed) - 1
    with tqdm(total=total, desc="reading", unit="token", unit_scale=True, delay=1.0, leave=False, disable=None) as bar:

        def update() -> None:
            bar.update(generation.read - bar.n)
            if generation.times.prefilled or generation.finish is not None:
                bar.close()

        yield update

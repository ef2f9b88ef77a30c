"""Writing on and on: memory does not grow with the text."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engines import finish
from helpers import built, tiny_config, tokens_of
from rwkv_backends.eager import Eager

from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Architecture
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.tokenizer import Tokenizer

LENGTH, WARM = 20_000, 2_000
REQUEST = Request(tokens_of(5), {"banned": "0"}, max_tokens=LENGTH, seed=1, keep=True)
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def endless(architecture: Architecture, tokenizer: Tokenizer, plugins: Plugins, lag: int = 0) -> Engine:
    """A tiny model that does not come to an end by itself."""
    model = built(architecture.random(tiny_config(architecture, layers=1)), plugins)
    return Engine(model, Eager(), plugins.sampler("banned,greedy"), tokenizer, lag=lag)


@pytest.mark.parametrize(("architecture", "lag"), [("rwkv6", 0), ("rwkv7", 1)], indirect=["architecture"])
def test_memory_is_flat_over_20_000_tokens(
    lag: int, architecture: Architecture, tokenizer: Tokenizer, plugins: Plugins
) -> None:
    """All that is kept of a token is its id and its text."""
    engine = endless(architecture, tokenizer, plugins, lag)
    finish(engine, replace(REQUEST, max_tokens=WARM))  # what is made once is not what grows
    generation = engine.submit(REQUEST)
    stream = engine.stream(generation)
    next(stream)
    gc.collect()
    before, resident_before = sys.getallocatedblocks(), resident()
    assert sum(1 for _ in stream) > LENGTH / 2  # taken and let go, as a caller who prints does
    gc.collect()
    assert (generation.finish, len(generation.tokens)) == ("length", LENGTH)
    assert sys.getallocatedblocks() - before < LENGTH / 20  # ids of bytes are shared: the list and the text alone grow
    assert resident() - resident_before < 4 << 20

"""What the tests of structured output share."""

from __future__ import annotations

from engines import finish
from helpers import built, byte_tokenizer, tiny_config

from rwkv_runtime import Plugins
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request


def engine_of(plugins: Plugins, sampler: str = "structured,nucleus", rows: int = 4) -> Engine:
    """A tiny model with the byte vocabulary; ids above 256 must never be drawn."""
    architecture = plugins.architectures.get("rwkv6")
    model = built(architecture.random(tiny_config(architecture)), plugins)
    return Engine(model, plugins.backends.get("eager"), plugins.sampler(sampler), byte_tokenizer(), rows)


def ask(max_tokens: int = 400, seed: int = 0, **params: object) -> Request:
    return Request(prompt=[5], params=params, max_tokens=max_tokens, seed=seed)


def texts(engine: Engine, *requests: Request) -> list[str]:
    """What is written, each to its end."""
    done = finish(engine, *requests)
    assert [g.finish for g in done] == ["end"] * len(requests), [(g.finish, g.error, g.text) for g in done]
    return [g.text for g in done]

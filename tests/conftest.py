"""Fixtures that all tests share. Plugins and tiny models are made once; no test changes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import Tensors, built, byte_tokenizer, tiny_config

from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """The built-in plugins."""
    return Plugins.load({"RWKV_PLUGINS": ""})


@pytest.fixture(scope="session", params=["rwkv6", "rwkv7"])
def architecture(request: pytest.FixtureRequest, plugins: Plugins) -> Architecture:
    """Each in turn; `only("rwkv6")` of helpers keeps a test to one."""
    return plugins.architectures.get(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a byte: byte b is id b + 1."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(architecture: Architecture) -> Tensors:
    """A tiny float32 checkpoint: two layers, two heads of 16."""
    return architecture.random(tiny_config(architecture))


@pytest.fixture(scope="session")
def model(checkpoint: Tensors, plugins: Plugins) -> Model:
    return built(checkpoint, plugins)


@pytest.fixture
def runtime(model: Model, tokenizer: Tokenizer, plugins: Plugins) -> Runtime:
    """The tiny model with the plainest backend."""
    return Runtime(model, tokenizer, plugins, "eager")


@pytest.fixture(params=[0, 1], ids=["at once", "one step behind"])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many steps behind engines read what they drew: as on a CPU, then as on a GPU."""
    monkeypatch.setattr("rwkv_runtime.engine.usual_lag", lambda device, sampler: request.param)
    steps: int = request.param
    return steps


@pytest.fixture
def poisoned() -> Iterator[None]:
    """All memory that a kernel is to write begins as NaN: a place left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

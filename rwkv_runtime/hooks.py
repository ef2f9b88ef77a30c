"""The contract between the runtime and its plugins: three hooks, called once when plugins are loaded.

A plugin is a module (or any object) with functions of these names, marked with `@hookimpl`, and found
through the entry-point group `rwkv_runtime`. See docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from rwkv_runtime.backend import Backend
    from rwkv_runtime.model import Architecture
    from rwkv_runtime.sampler import Sampler

PROJECT = "rwkv_runtime"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def rwkv_architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]
    """Offers model families: how to recognise a checkpoint, its sizes, its state and its forward pass."""


@hookspec(historic=True)
def rwkv_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Offers ways to execute a model: what `--backend NAME` chooses from."""


@hookspec(historic=True)
def rwkv_samplers() -> Iterable[Sampler]:  # type: ignore[empty-body]
    """Offers ways to choose a token: what `--sampler NAME[,NAME...]` chooses from."""

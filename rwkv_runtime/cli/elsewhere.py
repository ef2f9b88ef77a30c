"""What variables and the file of options say is meant for many runs: here is left out what this one has no use for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkv_runtime.plugins import Plugins

CHAT = {"prompt": None, "file": None, "explain": False, "trials": 1}
"""What --chat takes none of, and how each is when it is not given."""
PROMPTS = {**CHAT, "load_state": None, "save_state": None}
"""The same for --prompts."""


def of_use(options: Mapping[str, Any], plugins: Plugins) -> dict[str, Any]:
    """The options without those that were not typed and cannot be part of what was, nor of the mode that results.

    What was typed is left as it is, to be refused.
    """
    kept = dict(options)

    def drop(unset: Mapping[str, Any]) -> None:
        kept.update({name: value for name, value in unset.items() if name not in options["typed"]})

    if options["typed"] & {*CHAT, "prompts"}:
        drop({"chat": False})
    if options["typed"] & {*PROMPTS, "chat"}:
        drop({"prompts": None})
    drop(CHAT if kept["chat"] else PROMPTS if kept["prompts"] else {})
    kept["params"] = _of_the_sampler(options, plugins)
    return kept


def _of_the_sampler(options: Mapping[str, Any], plugins: Plugins) -> dict[str, object]:
    """Without parameters of other samplers, if they were not typed; a name that no sampler has stays."""
    chosen = plugins.sampler(options["sampler"]).params
    others = {name for sampler in plugins.samplers for name in sampler.params} - set(chosen) - options["typed_params"]
    return {name: value for name, value in options["params"].items() if name not in others}

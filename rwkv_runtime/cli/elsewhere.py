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
    kept, typed = dict(options), options["typed"]

    def drop(unset: Mapping[str, Any]) -> None:
        kept.update({name: value for name, value in unset.items() if name not in typed})

    if "prompt" in typed:
        drop({"file": None})
    if "as_json" in typed:
        drop({"prompts": None})
    if "echo" in typed and options["echo"]:
        drop({"chat": False, "prompts": None, "as_json": False})
    if typed & {*CHAT, "prompts"}:
        drop({"chat": False})
    if typed & {*PROMPTS, "chat"}:
        drop({"prompts": None})
    drop(CHAT if kept["chat"] else PROMPTS if kept["prompts"] else {})
    if not (kept["as_json"] or kept["explain"] or kept["prompts"]):
        drop({"logprobs": None})
    kept["params"] = _of_the_sampler(options, plugins)
    return kept


def _of_the_sampler(options: Mapping[str, Any], plugins: Plugins) -> dict[str, object]:
    """Without parameters of other samplers, if they were not typed; a name that no sampler has stays."""
    chosen = plugins.sampler(options["sampler"]).params
    others = {name for sampler in plugins.samplers for name in sampler.params} - set(chosen) - options["typed_params"]
    return {name: value for name, value in options["params"].items() if name not in others}

"""What can be refused before a model is loaded, and where the prompt comes from."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_runtime.cli.elsewhere import CHAT, PROMPTS
from rwkv_runtime.errors import OptionError, StateError
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import AUTO
from rwkv_runtime.sampler import check_params
from rwkv_runtime.settings import check_quant, parse_device, parse_dtype, parse_state_dtype
from rwkv_runtime.snapshot import check_snapshot

LONGEST_NAME = 255
"""Bytes, of a file on any system in use."""


def check(options: Mapping[str, Any], plugins: Plugins) -> None:
    """Raises OptionError for names, values, combinations and files that cannot be right."""
    if options["backend"] != AUTO:
        plugins.backends.get(options["backend"])
    check_params(plugins.sampler(options["sampler"]), options["params"])
    parse_device(options["device"])
    parse_dtype(options["dtype"])
    parse_state_dtype(options["state_dtype"])
    check_quant(options["quant"], plugins)
    if options["sha256"] and not re.fullmatch(r"\s*[0-9a-fA-F]{64}\s*", options["sha256"]):
        raise OptionError("--sha256 is 64 hexadecimal digits")
    _check_modes(options)
    _check_files(options)


def _check_modes(options: Mapping[str, Any]) -> None:
    if options["chat"] and options["prompts"]:
        raise OptionError("--chat and --prompts exclude each other")
    mode = "chat" if options["chat"] else "prompts" if options["prompts"] else None
    if mode:
        unset = CHAT if mode == "chat" else PROMPTS
        if barred := [name for name, value in unset.items() if options[name] not in (value, "")]:
            raise OptionError(f"--{mode} takes no {'prompt' if barred[0] == 'prompt' else _dashed(barred[0])}")
    for name, needed in (("chat_format", "chat"), ("rows", "prompts")):
        if name in options["typed"] and not options[needed]:
            raise OptionError(f"{_dashed(name)} goes with --{needed}")
    if "echo" in options["typed"] and options["echo"] and (mode or options["as_json"]):
        raise OptionError(f"--{mode or 'json'} takes no --echo; it is for text")
    if options["prompts"] and options["as_json"] and "as_json" in options["typed"]:
        raise OptionError("--prompts takes no --json; its output is lines of JSON as it is")
    if options["prompts"] and not options["output"]:
        raise OptionError("--prompts needs --output FILE")
    if "output" in options["typed"] and not options["prompts"]:
        raise OptionError("--output goes with --prompts; to keep a single text, redirect standard output")
    if options["logprobs"] and not (options["as_json"] or options["explain"] or options["prompts"]):
        raise OptionError("--logprobs goes with --json, --explain or --prompts")
    if options["prompt"] is not None and options["file"]:
        raise OptionError("give the prompt as an argument or by --file, not both")


def _check_files(options: Mapping[str, Any]) -> None:
    for name in ("model", "vocab", "file", "prompts", "output", "load_state", "save_state"):
        if options[name] == "":
            raise OptionError(f"{_dashed(name)} is empty; give the file's name")
        if options[name] == "-" and name != "file":
            raise OptionError(f"{_dashed(name)} -: a file is needed; of standard input only --file can read")
    for name in ("file", "vocab"):
        stdin = name == "file" and options[name] == "-"
        if options[name] and not stdin and not Path(options[name]).is_file():
            what = "a directory" if Path(options[name]).is_dir() else "no such file"
            raise OptionError(f"{_dashed(name)} {options[name]}: {what}")
    if options["load_state"]:
        try:
            check_snapshot(options["load_state"])
        except StateError as error:
            raise OptionError(f"--load-state {error}") from None
    if options["save_state"]:
        target = Path(options["save_state"])
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            raise OptionError(f"--save-state {target.name[:40]}...: a file's name is at most {LONGEST_NAME} bytes long")
        if target.exists() and not target.is_file():
            raise OptionError(f"--save-state {target}: not a file that could be replaced")
        if not os.access(target.parent, os.W_OK):
            raise OptionError(f"--save-state {target}: its folder is missing or cannot be written to")
    if options["prompts"]:
        from rwkv_runtime.cli.batch import check_files

        check_files(options)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_prompt(options: Mapping[str, Any]) -> str | None:
    """The argument, the file, or standard input, whose last line end is not part of it; None where none of them says
    anything. Raises OptionError."""
    if options["prompt"] not in (None, "-"):
        return _text(os.fsencode(options["prompt"]))
    if options["file"] and options["file"] != "-":
        return _trimmed(Path(options["file"]).read_bytes())
    asked = "-" in (options["prompt"], options["file"])
    if sys.stdin is None or (not asked and sys.stdin.isatty()):
        return None
    content = sys.stdin.buffer.read()
    return _trimmed(content) if content or asked else None


def _trimmed(content: bytes) -> str:
    """Without a byte order mark, and without the line end that editors and `echo` put last."""
    return re.sub(r"\r?\n\Z", "", _text(content.removeprefix(b"\xef\xbb\xbf")))


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt is not UTF-8 (byte {error.start + 1})") from None

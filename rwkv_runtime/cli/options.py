"""Types of options, and the file of options."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    Text = click.ParamType[str]
else:  # older versions of Click are not generic
    Text = click.ParamType

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


class CountType(click.IntRange):
    """A whole number with a lower bound."""

    def __init__(self, low: int) -> None:
        super().__init__(min=low)


class StopType(Text):
    """A stop string, with \\n, \\t and \\\\ understood; never split, so that a variable may hold spaces."""

    name = "text"
    envvar_list_splitter = "\0"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("a stop string cannot be empty", param, ctx)
        parts = text.split("\\\\")
        return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


class PairType(Text):
    """One half of `-o KEY VALUE`."""

    name = "key value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


def read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Makes the options of a TOML file the defaults of the command. An unknown name is refused."""
    if value is None:
        return None
    known = {p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p.name != "config"}
    spelt = {long_name(p): p.name for p in known.values()}
    defaults: dict[str, Any] = {}
    for key, setting in _parse_toml(value).items():
        name = key.replace("_", "-")
        if name not in spelt:
            near = get_close_matches(name, spelt, n=1)
            hint = f"did you mean {near[0]}?" if near else "see rwkv-run --help"
            raise click.BadParameter(f"{value}: there is no option {key!r}; {hint}", ctx, param)
        if name == "option" and isinstance(setting, dict):
            setting = [(k, str(v)) for k, v in setting.items()]
        elif name == "stop" and isinstance(setting, str):
            setting = [setting]
        elif isinstance(setting, dict | list) and name not in ("option", "stop"):
            raise click.BadParameter(f"{value}: {key} takes one value", ctx, param)
        defaults[str(spelt[name])] = setting
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def long_name(option: click.Option) -> str:
    """The option as it is written, without dashes: max-tokens."""
    return next(o for o in option.opts if o.startswith("--")).removeprefix("--")


def _parse_toml(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: not TOML: {error}") from None

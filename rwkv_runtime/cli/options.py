"""Types of options, the file of options, and which of several places a sampler's parameter comes from."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rwkv_runtime.errors import did_you_mean

if TYPE_CHECKING:
    Text = click.ParamType[str]
else:  # older versions of Click are not generic
    Text = click.ParamType

SHORT = ("temperature", "top_p", "top_k")
"""Parameters of samplers that have an option of their own."""
PLACES = (ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT, ParameterSource.COMMANDLINE)
"""The file of options, the environment, the command line: each wins over those before it."""
VARIABLES = "RWKV_RUN_"
"""What the names of all variables begin with."""
OPTION_VARIABLE = f"{VARIABLES}OPTION"
SEE_HELP = "see rwkv-run --help"


class CountType(click.IntRange):
    """A whole number within bounds."""

    def __init__(self, low: int, high: int | None = None) -> None:
        super().__init__(min=low, max=high)


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


def typed(ctx: click.Context) -> frozenset[str]:
    """Names of the options on the command line itself: what is set elsewhere is meant for other runs, too."""
    return frozenset(name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE)


def sampler_params(ctx: click.Context, *places: ParameterSource) -> dict[str, object]:
    """Parameters for the sampler from `-o` and the short options; where one place has both, they must agree."""
    params: dict[str, object] = {}
    for place in places or PLACES:
        pairs = _pairs(_options_of(ctx, place))
        short = {name: ctx.params[name] for name in SHORT if ctx.get_parameter_source(name) == place}
        for name in pairs.keys() & short.keys():
            if not _agree(pairs[name], short[name]):
                both = f"as {short[name]:g} by --{name.replace('_', '-')} and as {pairs[name]} by -o"
                raise click.UsageError(f"{name} is given {both}; leave one of them out")
        params |= pairs | short
    return params


def typed_params(ctx: click.Context) -> frozenset[str]:
    """Names of those on the command line itself."""
    return frozenset(sampler_params(ctx, ParameterSource.COMMANDLINE))


def _agree(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _options_of(ctx: click.Context, place: ParameterSource) -> Iterable[tuple[str, str]]:
    """The `-o` pairs of one place; Click itself keeps those of the last place alone."""
    given: Iterable[tuple[str, str]] = ()
    if place == ParameterSource.DEFAULT_MAP:
        given = (ctx.default_map or {}).get("option", ())
    elif place == ParameterSource.ENVIRONMENT:
        try:
            words = shlex.split(os.environ.get(OPTION_VARIABLE, ""))
        except ValueError as error:
            raise click.BadParameter(f"{OPTION_VARIABLE} holds words as a shell has them: {error}") from None
        if len(words) % 2:
            raise click.BadParameter(f"{OPTION_VARIABLE} holds pairs of words, KEY VALUE; it has {len(words)} words")
        given = zip(words[::2], words[1::2], strict=True)
    elif ctx.get_parameter_source("option") == place:
        given = ctx.params["option"]
    return given


def _pairs(options: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name.replace("-", "_"): value for name, value in options}


def unknown_variables(ctx: click.Context) -> str | None:
    """One line about variables that look like an option's and are none; None where all are known.

    They are not refused: an environment is shared with other versions and other people.
    """
    options = [p for p in ctx.command.params if isinstance(p, click.Option)]
    known = [str(p.envvar or f"{VARIABLES}{p.name}".upper()).removeprefix(VARIABLES) for p in options]
    given = [name.removeprefix(VARIABLES) for name in sorted(os.environ) if name.startswith(VARIABLES)]
    hints = [
        f"{VARIABLES}{name} ({did_you_mean(name, known, SEE_HELP, prefix=VARIABLES)})"
        for name in given
        if name not in known
    ]
    return f"no option is set by the variable {', nor by '.join(hints)}" if hints else None


def read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Makes the options of a TOML file the defaults of the command. An unknown name or a wrong type is refused."""
    if value is None:
        return None
    known = [p for p in ctx.command.params if isinstance(p, click.Option)]
    spelt = {long_name(p): p for p in known if p.name not in ("config", "table", "version", "help")}
    defaults: dict[str, Any] = {}
    for key, setting in _parse_toml(value).items():
        name = key.replace("_", "-")
        if name not in spelt:
            hint = did_you_mean(name, spelt, SEE_HELP)
            raise click.BadParameter(f"{value}: there is no option {key!r}; {hint}", ctx, param)
        option = spelt[name]
        problem = _wrong_type(option, setting)
        if problem:
            raise click.BadParameter(f"{value}: {key} is {problem}", ctx, param)
        if name == "option":
            setting = [(k, json.dumps(v) if isinstance(v, (dict, list)) else str(v)) for k, v in setting.items()]
        elif option.multiple and isinstance(setting, str):
            setting = [setting]
        defaults[str(option.name)] = setting
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def _wrong_type(option: click.Option, setting: Any) -> str | None:
    """What the option takes, where the setting is of another type."""
    if option.name == "option":
        return None if isinstance(setting, dict) else "a table of names and values"
    if option.multiple:
        texts = [setting] if isinstance(setting, str) else setting
        return (
            None if isinstance(texts, list) and all(isinstance(t, str) for t in texts) else "a text or a list of texts"
        )
    if option.is_flag:
        return None if isinstance(setting, bool) else "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return None if type(setting) is int else "a whole number"
    if isinstance(option.type, click.types.FloatParamType):
        return None if type(setting) in (int, float) else "a number"
    return None if isinstance(setting, str) else "a text"


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
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, numbers of thousands of digits
        raise click.BadParameter(f"{path}: not TOML: {error}") from None

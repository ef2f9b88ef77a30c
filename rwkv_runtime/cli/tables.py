"""What is installed: --plugins, --backends, --samplers."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import click

from rwkv_runtime.cli.command import echo_json
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import usable
from rwkv_runtime.sampler import Param

Row = dict[str, Any]


def show(what: str, plugins: Plugins, as_json: bool) -> None:
    """Prints a table for people, or one JSON line a row."""
    rows = {"plugins": _plugins, "backends": _backends, "samplers": _samplers}[what](plugins)
    for row in rows:
        if as_json:
            echo_json(row)
        else:
            click.echo(_paragraph(row))


def _plugins(plugins: Plugins) -> list[Row]:
    rows: list[Row] = []
    for plugin in plugins.plugins:
        offers = [f"{kind} {name}" for kind, names in plugin.offers.items() for name in names]
        row: Row = {"name": plugin.name, "from": f"{plugin.distribution} {plugin.version}".strip()}
        rows.append(row | ({"problem": plugin.problem} if plugin.problem else {"offers": offers}))
    return rows


def _backends(plugins: Plugins) -> list[Row]:
    reasons = usable(plugins)
    return [
        {"name": b.name, "does": b.summary, "usable": "yes" if reasons[b.name] is None else f"no: {reasons[b.name]}"}
        for b in sorted(plugins.backends, key=lambda b: -b.priority)
    ]


def _samplers(plugins: Plugins) -> list[Row]:
    return [
        {"name": s.name, "does": s.summary, "options": {name: _param(p) for name, p in s.params.items()}}
        for s in plugins.samplers
    ]


def _param(param: Param) -> str:
    if isinstance(param.default, str):
        return f"{param.help} (a text; default {param.default!r})"
    off = "" if param.off is None else f"; {param.off:g} is off"
    return f"{param.help} (default {param.default:g}, {param.bounds()}{off})"


def _paragraph(row: Row) -> str:
    """The name, then what there is to say of it, indented."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [row["name"]]
    for key, value in row.items():
        if isinstance(value, dict):
            items = [f"{name}: {text}" for name, text in value.items()]
        elif isinstance(value, list):
            items = [f"{key}: {', '.join(value) or 'nothing'}"]
        else:
            items = [value if key == "does" else f"{key}: {value}"]
        if key != "name":
            for item in items:
                lines += textwrap.wrap(item, width, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)

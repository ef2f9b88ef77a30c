"""Refuses the JSON schemas that llguidance would take and not keep to the letter.

It refuses most keywords that it does not know by itself. What is left for us: keywords it passes over because no
draft has them (`requird`), settings in the schema that loosen it, what depends on the draft, numbers that do not
fit a float64, and counts of properties, since it lets a name come twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn
from urllib.parse import unquote

from rwkv_runtime import OptionError

ONE = {"items", "additionalProperties"}
LIST = {"anyOf", "oneOf", "allOf", "prefixItems"}
MAP = {"properties", "patternProperties"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
OTHER = {"type", "enum", "const", "required", "pattern", "format", "$ref"}
NOTES = {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}
NOTES |= {"example", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"}
KNOWN = ONE | LIST | MAP | BOUNDS | COUNTS | OTHER | NOTES
DRAFTS = ("draft/2020-12/schema", "draft/2019-09/schema", "draft-07/schema")
EXACT = 2**53  # a float64 holds every whole number up to here


def check_schema(text: str) -> None:
    """Raises OptionError with the reason and the place where the schema cannot be kept to."""
    try:
        root = json.loads(text, parse_constant=_no_json)
        _Check(root).run()
    except RecursionError:
        _refuse("", "nested too deeply")
    except ValueError as error:
        _refuse("", f"not JSON: {error}")


def check_embedded(grammar: str) -> None:
    """The same for every schema after `%json` in a Lark grammar."""
    for match in re.finditer(r"%json\b\s*", grammar):
        try:
            _, end = json.JSONDecoder().raw_decode(grammar, match.end())
        except (ValueError, RecursionError):
            raise OptionError("grammar: what follows a %json is not a JSON schema") from None
        check_schema(grammar[match.end() : end])


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse(place: str, problem: str) -> NoReturn:
    raise OptionError(f"json_schema{' at #' * bool(place)}{place}: {problem}")


class _Check:
    """One schema: its parts are looked at once each, those behind a `$ref` too, whatever leads to them."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.todo: list[tuple[str, Any]] = [("", root)]
        self.seen: set[str] = set()

    def run(self) -> None:
        if not isinstance(self.root, dict):
            _refuse("", "a schema is an object")
        draft = str(self.root.get("$schema", DRAFTS[0]))
        if not draft.rstrip("#").endswith(DRAFTS):
            _refuse("/$schema", f"{draft[:100]!r} is not supported; there are 2020-12, 2019-09 and draft-07")
        self.tuples = draft.rstrip("#").endswith(DRAFTS[0])
        while self.todo:
            place, schema = self.todo.pop()
            if place not in self.seen:
                self.seen.add(place)
                if isinstance(schema, dict):
                    self.look(place, schema)
                elif not isinstance(schema, bool):
                    _refuse(place, "a schema is an object, true or false")

    def look(self, place: str, schema: dict[str, Any]) -> None:
        for name in schema:
            if name == "x-guidance" or (name not in KNOWN and not name.startswith("x-")):
                near = get_close_matches(name, KNOWN, n=1, cutoff=0.8)
                _refuse(place, f"{name[:100]!r} is not supported" + (f"; did you mean {near[0]}?" if near else ""))
        for name in BOUNDS & schema.keys():
            self.number(f"{place}/{name}", schema[name])
        for value in [schema.get("const"), *_listed(schema.get("enum"))]:
            for number in _numbers(value):
                self.number(place, number)
        if "prefixItems" in schema and not self.tuples:
            _refuse(place, "'prefixItems' belongs to draft 2020-12, and another one is named by $schema")
        if place and "$id" in schema:
            _refuse(place, "'$id' is supported at the top alone")
        if isinstance(count := schema.get("minProperties"), (int, float)) and count > 1:
            _refuse(place, "'minProperties' above 1 is not supported; name the properties in 'required'")
        self.todo += self.parts(place, schema)

    def parts(self, place: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The schemas in this one, each with its place."""
        for name in ONE & schema.keys():
            yield f"{place}/{name}", schema[name]
        for name in LIST & schema.keys():
            yield from ((f"{place}/{name}/{i}", part) for i, part in enumerate(_listed(schema[name])))
        for name in MAP & schema.keys():
            if isinstance(schema[name], dict):
                yield from ((f"{place}/{name}/{_escaped(key)}", part) for key, part in schema[name].items())
        if "$ref" in schema:
            yield self.referred(place, schema["$ref"])

    def referred(self, place: str, reference: object) -> tuple[str, Any]:
        target = unquote(reference) if isinstance(reference, str) else ""
        if not re.match(r"#(/|$)", target):
            _refuse(place, "a '$ref' is supported within the schema alone, as in '#/$defs/NAME'")
        value, place_of_it = self.root, ""  # one spelling for each place, whatever the reference's: it is looked up
        for part in target[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            place_of_it += f"/{_escaped(key)}"
            if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]{0,6}", key) and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                _refuse(place, f"the '$ref' {target[:100]!r} leads nowhere")
        return place_of_it, value

    def number(self, place: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _refuse(place, "this is not a number")
        if abs(value) > EXACT:
            _refuse(place, "numbers beyond 2^53 are not supported")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _numbers(value: Any) -> Iterator[int | float]:
    """Every number in a value."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value

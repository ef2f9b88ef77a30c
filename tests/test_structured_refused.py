"""Structured output: what cannot be honoured is refused, in one line and within a second."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import rwkv_structured
from cli_runs import rwkv_run
from engines import finish
from structured import ask, engine_of

from rwkv_runtime import OptionError
from rwkv_runtime.engine import Engine

pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")


@pytest.fixture(scope="module")
def engine(plugins) -> Engine:
    return engine_of(plugins)


def refusal(engine: Engine, **params: object) -> str:
    """The refusal of a setting, which must come within a second."""
    begin = time.perf_counter()
    with pytest.raises(OptionError) as caught:
        engine.submit(ask(8, **params))
    assert time.perf_counter() - begin < 1
    return str(caught.value)


UNSUPPORTED = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "uniqueItems": {"type": "array", "items": {"uniqueItems": True}},
    "contains": {"contains": {"type": "integer"}},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {}}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "x-guidance": {"x-guidance": {"lenient": True}, "type": "object"},
    "nullable": {"$ref": "#/x-parts/0", "x-parts": [{"type": "string", "nullable": True}]},
    "did you mean required": {"requird": ["a"]},
    "minProperties": {"type": "object", "minProperties": 2},
    "#/properties/a~1b: numbers beyond": {"properties": {"a/b": {"const": [2**60]}}},
    "#/maximum: this is not": {"maximum": True},
    "exclusiveMinimum: this is not": {"minimum": 1, "exclusiveMinimum": True},
    "#/items: a schema is": {"items": [{"type": "string"}]},
    "prefixItems": {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]},
    "#/$schema": {"$schema": "http://json-schema.org/draft-04/schema#"},
    "$id": {"items": {"$id": "http://a/b"}},
    "leads nowhere": {"$ref": "#/$defs/a"},
    "within the schema": {"$ref": "http://example.org/a.json"},
    "Unknown format": {"type": "string", "format": "phone"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "look-around": {"type": "string", "pattern": "^(?=a)"},
    "Invalid type": {"type": "text"},
    "Unsatisfiable": {"type": "string", "minLength": 3, "maxLength": 2},
    "nothing can satisfy": {"$ref": "#"},
}  # fmt: skip


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_a_schema_that_cannot_be_honoured_is_refused(engine, problem):
    assert problem in refusal(engine, json_schema=json.dumps(UNSUPPORTED[problem]))


OTHERWISE_WRONG = [
    ({"json_schema": "{"}, "not JSON"),
    ({"json_schema": '{"const": NaN}'}, "NaN is no number"),
    ({"json_schema": '{"const": "\udc80"}'}, "not Unicode"),
    ({"json_schema": "none.json"}, "cannot read 'none.json': No such file"),
    ({"json_schema": "a\0b"}, "cannot read"),
    ({"json_schema": "/dev/null"}, "not a regular file"),
    ({"json_schema": "."}, "not a regular file"),
    ({"json_schema": '{"const": "' + "x" * 2**17 + '"}'}, "longer than"),
    ({"grammar": "start " * 100_000}, "longer than"),
    ({"json_schema": "{}", "regex": "a"}, "json_schema and regex exclude each other"),
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": r"[^\s\S]"}, "nothing can satisfy"),
    ({"grammar": "start: nothing"}, "unknown name"),
    ({"grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, "x-guidance"),
    ({"grammar": "start: %json nothing"}, "not a JSON schema"),
]


@pytest.mark.parametrize(("params", "problem"), OTHERWISE_WRONG, ids=range(len(OTHERWISE_WRONG)))
def test_what_is_wrong_is_said_in_one_line(engine, params, problem):
    message = refusal(engine, **params)
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(("params", "problem"), [*OTHERWISE_WRONG[:1], OTHERWISE_WRONG[3], OTHERWISE_WRONG[9]])
def test_the_command_refuses_it_before_the_model_is_loaded(params, problem):
    words = [word for name, text in params.items() for word in ("-o", name, text)]
    result = rwkv_run(Path("missing.pth"), "Once", "--sampler", "structured,greedy", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1


def chain_of(count: int) -> dict[str, object]:
    parts = {f"d{i}": {"properties": {"n": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)}
    return {"$defs": {**parts, f"d{count}": {}}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "references that overflow the stack": {"json_schema": json.dumps(chain_of(2000))},
    "rules that overflow the stack": {
        "grammar": "start: r0\n" + "".join(f'r{i}: "b"? r{i + 1}\n' for i in range(3000)) + "r3000: "
    },
    "nested arrays": {"json_schema": '{"items":' * 2000 + "{}" + "}" * 2000},
    "nested very deeply": {"json_schema": '{"a":' * 20000 + "{}" + "}" * 20000},
    "a large divisor": {"json_schema": '{"type": "integer", "multipleOf": 99999989}'},
    "many required names": {"json_schema": json.dumps({"type": "object", "required": [f"p{i}" for i in range(9000)]})},
    "products of alternatives": {"json_schema": json.dumps({"allOf": [
        {"anyOf": [{"required": [f"p{i}{j}"], "properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(9)]})},
    "repeated repetitions": {"regex": "((a{1000}){1000}){1000}"},
    "optional letters": {"regex": "a?" * 20000 + "a" * 20000},
    "nested groups": {"regex": "(" * 9000 + "a" + ")" * 9000},
    "nothing, ambiguously": {"grammar": "start: e\ne: " + " | ".join(["e e"] * 2000) + " | "},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_meant_to_hang_it_is_refused_within_a_second(engine, kind):
    assert refusal(engine, **HOSTILE[kind])


HARMLESS = [
    {"json_schema": '{"type": "string", "maxLength": 1000000000}'},
    {"json_schema": '{"items": {"items": {"maxItems": 1000000}, "minItems": 999999}, "type": "array", "minItems": 9}'},
    {"json_schema": json.dumps({"enum": [f"value {i}" for i in range(4000)]})},
    {"json_schema": '{"anyOf": [{"items": {"$ref": "#"}}, {"items": {"$ref": "#"}, "type": "array"}]}'},
    {"regex": "(a+)+$"},
    {"regex": "(.*a.{30})"},
    {"regex": ".{1000000}"},
    {"grammar": 'start: start start | "a" | start "a"'},
]


@pytest.mark.parametrize("params", HARMLESS, ids=range(len(HARMLESS)))
def test_what_would_hang_others_is_written_in_bounded_time(engine, params):
    begin = time.perf_counter()
    (generation,) = finish(engine, ask(6, **params))
    assert generation.finish in ("length", "end", "error")
    assert time.perf_counter() - begin < 1.5


def test_without_the_extra_only_those_who_ask_are_told(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert refusal(engine, regex="a") == "structured output needs llguidance; install rwkv-runtime[structured]"
    assert finish(engine, ask(3))[0].finish == "length"


def test_the_library_is_not_loaded_with_the_plugin():
    for path in Path(rwkv_structured.__path__[0]).glob("*.py"):
        assert not re.search(r"^(import|from) llguidance", path.read_text(encoding="utf-8"), re.MULTILINE)

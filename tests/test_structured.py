"""Structured output: what is written satisfies what was asked, row by row."""

from __future__ import annotations

import gc
import json
import re
import weakref

import pytest
import torch
from engines import finish
from helpers import CPU, VOCAB_SIZE, byte_tokenizer, controls_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rwkv_structured import compiling
from rwkv_structured.structured import Structured
from structured import ask, engine_of, texts

from rwkv_runtime import Chain, OptionError, SamplingError, Tokenizer
from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.sampler import check_params
from rwkv_runtime.testing import check_sampler
from rwkv_runtime.tokenizer import load_tokenizer, world_vocabulary

pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, of the extra 'test', is not installed")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", '"\\', 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"enum": ["red", "grün", "青", 12, -1.5, None, True, {"a": [1, {}]}, "line\nbreak\ttab"]},
    {"type": "number", "minimum": -2, "maximum": 7.25},
    {"type": "integer", "multipleOf": 7, "minimum": 100, "maximum": 999},
    {"type": ["boolean", "null"]},
    {"type": "string", "pattern": "^[A-Zé]{2}-[0-9]+$", "maxLength": 6},
    {"type": "string", "format": "date"},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": {"type": "null"}, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2},
     "minItems": 2, "maxItems": 3},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "maxProperties": 1, "required": ["a"]},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "additionalProperties": False,
     "maxProperties": 2},
    {"$defs": {"tree": {"type": "object", "properties": {"v": {"enum": [1, 2]}, "kids": {"type": "array",
     "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}}, "required": ["v"], "additionalProperties": False},
     "leaf": {"type": "object", "properties": {"v": {"enum": [3]}}, "additionalProperties": False}},
     "$ref": "#/$defs/tree"},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "boolean"}},
     "required": ["kind", "x"], "additionalProperties": False}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(plugins) -> Engine:
    return engine_of(plugins)


def assert_satisfies(text, schema):
    """jsonschema raises where it does not."""
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_what_is_written_satisfies_the_schema(engine, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in texts(engine, *(ask(json_schema=json.dumps(schema), seed=seed) for seed in range(6))):
        assert_satisfies(text, schema)


def test_any_sampler_may_follow_or_none(plugins):
    for sampler in ("structured", "structured,greedy"):
        (text,) = texts(engine_of(plugins, sampler, 1), ask(json_schema=PERSON))
        assert_satisfies(text, PERSON)


names = st.text('abé /"\\', max_size=3)
values = st.none() | st.booleans() | st.integers(-99, 99) | st.text('xyö\n"\\ ', max_size=4)
leaves = st.one_of(
    st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=4)),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-50, 50),
              st.integers(0, 99)),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, st.integers(0, 2),
              st.integers(0, 3)),
    st.just({"type": ["boolean", "null"]}),
)  # fmt: skip


def grown(inner):
    def object_of(properties, required):
        need = sorted(set(properties) & set(required))
        return {"type": "object", "properties": properties, "required": need, "additionalProperties": False}

    return st.one_of(
        st.builds(object_of, st.dictionaries(names, inner, max_size=3), st.lists(names, max_size=2)),
        st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(lambda s: {"anyOf": s}, st.lists(inner, min_size=1, max_size=3)),
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(leaves, grown, max_leaves=5), st.integers(0, 99))
def test_any_small_schema_is_satisfied(engine, schema, seed):
    (text,) = texts(engine, ask(2000, seed, json_schema=json.dumps(schema)))
    assert_satisfies(text, schema)


@pytest.mark.parametrize(
    "regex", [r"(yes|no)", r"[0-9]{3}-[a-f]{2,4}", r"(?i)abc\.", r"é{2}[^a-z\x00-\x1f]", r"x?", r"(a|b)*c{2}d"]
)
def test_what_is_written_matches_the_regex(engine, regex):
    for text in texts(engine, *(ask(regex=regex, seed=seed) for seed in range(4))):
        assert re.fullmatch(regex, text)


def test_what_is_written_follows_the_grammar(engine):
    grammar = 'start: NUMBER (("+" | "*") NUMBER)~1..3\nNUMBER: /[1-9][0-9]?/\n'
    for text in texts(engine, *(ask(grammar=grammar, seed=seed) for seed in range(4))):
        assert re.fullmatch(r"[1-9]\d?([+*][1-9]\d?){1,3}", text)
    (text,) = texts(engine, ask(grammar='start: "v=" value\nvalue: %json {"enum": [1, "x"]}'))
    assert text in ("v=1", 'v="x"')


def test_a_schema_or_a_grammar_may_be_in_a_file(engine, tmp_path):
    (tmp_path / "schema.json").write_bytes(b'\xef\xbb\xbf\n {"const": 5}')
    (tmp_path / "a.lark").write_text('start: "ab"')
    found = texts(engine, ask(json_schema=tmp_path / "schema.json"), ask(grammar=tmp_path / "a.lark"))
    assert found == ["5", "ab"]


def test_no_name_of_a_property_has_a_second_spelling(engine):
    schema = json.dumps({"properties": {"a": {"type": "integer"}}, "type": "object"})
    vocabulary = compiling.compiled_vocabulary(engine.tokenizer)
    for text, fits in {
        '{"a": 1, "b": "x"}': True,
        '{"\\u0061": "x"}': False,
        '{"a":"x"}': False,
        '{"b":"\\n"}': True,
    }.items():
        ids = engine.tokenizer.encode(text)
        matcher = compiling.matcher_of(compiling.grammar_of({"json_schema": schema}), vocabulary)
        assert (matcher.try_consume_tokens(ids) == len(ids)) is fits, text


def test_rows_with_and_without_a_schema_share_a_batch(engine):
    """Lengths differ and there are more requests than rows, so that rows move and are taken again."""
    schema = json.dumps(PERSON)
    requests = [
        ask(30, 1),
        ask(seed=2, json_schema=schema),
        ask(seed=3, regex="[a-c]{2}"),
        ask(9, 4),
        ask(seed=5, grammar='start: "x"~20'),
        ask(seed=2, json_schema=schema),
        ask(seed=7, regex="[0-9]{1,30}"),
    ]
    together = [(g.text, g.finish) for g in finish(engine, *requests)]
    assert together == [(g.text, g.finish) for request in requests for g in finish(engine, request)]
    assert together[1] == together[5]
    jsonschema.validate(json.loads(together[1][0]), PERSON)
    assert (together[2][1], len(together[2][0]), together[3][1], together[4]) == ("end", 2, "length", ("x" * 20, "end"))


def test_a_request_that_is_refused_disturbs_no_other(engine):
    good = engine.submit(ask(regex="ab"))
    with pytest.raises(OptionError, match="unclosed group"):
        engine.submit(ask(regex="("))
    (free,) = finish(engine, ask(5))
    assert (good.text, good.finish, free.finish) == ("ab", "end", "length")


def test_a_row_whose_limits_are_reached_fails_alone(engine):
    regex = r"(\p{L}{1,500}\p{N}?){1,100}"
    rest = " | ".join(f'"{i}" rest' for i in range(2500))  # more than there may be, where the trial does not come
    many = ask(20, grammar=f'start: {"ab " * 6} rest\nab: "a" | "b"\nrest: {rest}')
    good, bad, other = finish(engine, ask(regex="a{30}"), many, ask(20, regex=regex))
    assert (good.text, bad.finish) == ("a" * 30, "error")
    assert re.fullmatch("[ab]+", bad.text)
    assert isinstance(bad.error, SamplingError)
    assert other.finish in ("error", "length")


def test_a_text_may_be_cut_short_and_gone_on_from(engine):
    """Each request is a text of its own: what a saved state has read is no part of it."""
    request = Request(prompt=[5], params={"regex": "[a-z]{50}"}, max_tokens=10, keep=True)
    (first,) = finish(engine, request)
    assert (first.finish, len(first.text)) == ("length", 10)
    for snapshot in (first.snapshot, first.prompt_snapshot):
        (second,) = finish(engine, Request(params={"regex": "[0-9]{3}"}, max_tokens=10, start=snapshot))
        assert (second.finish, len(second.text)) == ("end", 3)


def test_a_chain_shows_its_candidates(engine):
    (generation,) = finish(engine, Request(prompt=[5], params={"regex": "ab|cd"}, max_tokens=9, observe=3))
    assert generation.text in ("ab", "cd")
    assert len(generation.observations) == 3


def test_only_the_end_of_text_follows_the_end():
    sampler, controls = primed(byte_tokenizer(), regex="a")
    logits = torch.zeros(1, VOCAB_SIZE)
    for allowed in (ord("a") + 1, 0, 0):
        sampler.prepare(controls)
        kept = sampler.filter(logits, controls)
        assert kept[0].isfinite().nonzero().flatten().tolist() == [allowed]
        sampler.update(torch.tensor([allowed]), logits, controls)
    assert torch.equal(logits, torch.zeros(1, VOCAB_SIZE))


def primed(tokenizer: Tokenizer, vocab_size: int = VOCAB_SIZE, **params: object) -> tuple[Structured, Controls]:
    sampler = Structured()
    controls = Controls.allocate(sampler, 1, vocab_size, CPU, tokenizer)
    controls.set(0, check_params(sampler, params), 0, 0)
    sampler.prime(torch.tensor([0]), controls)
    return sampler, controls


def test_the_world_vocabulary_with_gaps_and_a_larger_model():
    tokenizer = load_tokenizer(world_vocabulary())
    sampler, controls = primed(tokenizer, 65536, json_schema='{"const": "schön ✓"}')
    logits = torch.randn(1, 65536, generator=torch.Generator().manual_seed(1))
    drawn = []
    while not drawn or drawn[-1]:
        sampler.prepare(controls)
        token = sampler.sample(logits, controls)
        sampler.update(token, logits, controls)
        drawn += token.tolist()
    assert json.loads(tokenizer.decode(drawn)) == "schön ✓"


def test_a_vocabulary_is_compiled_once_and_let_go_with_its_tokenizer():
    sampler, controls = primed(tokenizer := byte_tokenizer(), regex="a")
    (compiled,) = sampler._vocabularies.values()
    sampler.prime(torch.tensor([0]), controls)
    assert list(sampler._vocabularies.values()) == [compiled]
    gone = weakref.ref(tokenizer)
    del tokenizer, controls
    gc.collect()
    assert gone() is None
    assert not sampler._vocabularies


def test_with_no_text_it_does_nothing():
    check_sampler(Structured())
    sampler = Structured()
    logits = torch.randn(3, 9)
    assert sampler.filter(logits, controls_of(sampler, 3, 9)) is logits
    assert Chain([sampler]).runs == "host"

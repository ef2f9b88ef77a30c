"""A text as it comes: piece by piece, to its end, whatever ends it; and nothing written is ever lost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import Poisoned, Scripted, finish
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_samplers.nucleus import Nucleus

from rwkv_runtime import engine as module
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError, SamplingError
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Model
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.tokenizer import Tokenizer

Script = Callable[..., Engine]
pytestmark = pytest.mark.usefixtures("lag")


@pytest.fixture
def scripted(model: Model, tokenizer: Tokenizer) -> Script:
    """An engine that writes what it is told."""
    return lambda script, rows=1: Engine(model, Eager(), Scripted(script), tokenizer, rows)


def test_each_piece_is_given_as_soon_as_it_is_drawn(scripted: Script) -> None:
    engine = scripted(b"Once upon a time")
    generation = engine.submit(Request(max_tokens=16))
    stream = engine.stream(generation)
    for count, letter in enumerate("Once upon a time", 1):
        assert next(stream) == letter
        assert len(generation.tokens) == count
    assert list(stream) == []
    assert (generation.text, generation.finish) == ("Once upon a time", "length")


def test_characters_of_several_bytes_come_whole(scripted: Script) -> None:
    engine = scripted("a\u00e9\u65e5\U0001f600!".encode())
    assert list(engine.stream(engine.submit(Request(max_tokens=11)))) == ["a", "\u00e9", "\u65e5", "\U0001f600", "!"]
    cut = engine.submit(Request(max_tokens=9))
    assert "".join(engine.stream(cut)) == "a\u00e9\u65e5\ufffd"  # what cannot be completed any more


def test_a_stop_string_is_found_across_tokens_and_not_given(scripted: Script) -> None:
    engine = scripted(b"Yes.\n\nUser: and")
    generation = engine.submit(Request(stop=("\n\nUser:", "never")))
    assert "".join(engine.stream(generation)) == "Yes."
    assert (generation.finish, len(generation.tokens)) == ("stop", 11)


def test_the_beginning_of_a_stop_string_is_given_at_the_end(scripted: Script, lag: int) -> None:
    engine = scripted(b"Yes.\n\nUs")
    assert list(engine.stream(engine.submit(Request(max_tokens=8, stop=("\n\nUser:",)))))[-2:] == [".", "\n\nUs"]
    cancelled = engine.submit(Request(max_tokens=8, stop=("\n\nUser:",)))
    for _ in range(6 + lag):
        engine.step()
    engine.cancel(cancelled)
    assert "".join(engine.stream(cancelled)) == cancelled.text == "Yes.\n\n"


def test_end_of_text_ends_the_text(scripted: Script) -> None:
    engine = scripted([*(byte + 1 for byte in b"The end."), 0, 66])
    generation = engine.submit(Request())
    assert "".join(engine.stream(generation)) == "The end."
    assert (generation.finish, generation.tokens[-1]) == ("end", 0)


def test_a_budget_of_seconds_ends_the_text(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))  # every look takes a second
    generation = finish(scripted(b"abc"), Request(seconds=10.0))[0]
    assert generation.finish == "time"
    assert 1 <= len(generation.tokens) <= 10
    assert generation.times.last - generation.times.started >= 10.0


def test_the_times_of_a_text_are_in_order(scripted: Script) -> None:
    times = finish(scripted(b"abc"), Request(tokens_of(600), max_tokens=3))[0].times
    assert times.submitted <= times.started <= times.prefilled <= times.first <= times.last


def test_leaving_a_stream_cancels_its_text_and_keeps_what_was_written(scripted: Script) -> None:
    engine = scripted(b"abcdef", rows=2)
    left, other = engine.submit(Request(keep=True)), engine.submit(Request(max_tokens=20))
    stream = engine.stream(left)
    assert [next(stream) for _ in range(3)] == ["a", "b", "c"]
    stream.close()
    assert (left.finish, left.text, engine.active) == ("cancelled", "abc", [other])
    assert left.snapshot is not None
    assert left.snapshot.pending == (ord("c") + 1,)
    assert "".join(engine.stream(other)) == "abcdefabcdefabcdefab"


def test_an_interruption_keeps_what_was_written(scripted: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted(b"abcdef")
    generation = engine.submit(Request())
    stream = engine.stream(generation)
    assert next(stream) == "a"

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert (generation.text, generation.finish, engine.active) == ("a", "cancelled", [])
    assert "".join(engine.stream(engine.submit(Request(max_tokens=4)))) == "abcd"


def test_a_text_can_be_cancelled_wherever_it_is(scripted: Script, lag: int) -> None:
    engine = scripted(b"abc")
    writing, reading, waiting = (
        engine.submit(Request()),
        engine.submit(Request(tokens_of(2000))),
        engine.submit(Request()),
    )
    for _ in range(1 + lag):
        engine.step()
    for generation in (waiting, writing):
        engine.cancel(generation)
    engine.step()
    assert engine.prefilling is reading
    engine.cancel(reading)
    engine.cancel(reading)
    assert [g.finish for g in (writing, reading, waiting)] == ["cancelled"] * 3
    assert [g.text for g in (writing, reading, waiting)] == ["a", "", ""]
    assert (engine.active, list(engine.waiting), engine.prefilling) == ([], [], None)
    assert finish(engine, Request(max_tokens=3))[0].text == "abc"


@pytest.mark.parametrize("rows", [1, 2])
def test_two_streams_over_one_engine_can_be_read_by_turns(rows: int, model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, Eager(), Nucleus(), tokenizer, rows)
    requests = [Request([65 + i], max_tokens=12, seed=i) for i in range(2)]
    alone = [finish(engine, request)[0].text for request in requests]
    one, two = (engine.stream(engine.submit(request)) for request in requests)
    pieces = list(itertools.zip_longest(one, two, fillvalue=""))
    assert ["".join(side) for side in zip(*pieces, strict=True)] == alone


def test_the_text_before_a_failure_is_given_before_the_error(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, Eager(), Poisoned(), tokenizer)
    healthy = finish(engine, Request([5], max_tokens=6, seed=1))[0]
    bad = engine.submit(Request([5], {"at": 6}, seed=1))
    given = []
    with pytest.raises(SamplingError):
        given.extend(engine.stream(bad))
    assert bad.text == healthy.text


def test_generate_streams_what_the_engine_writes(runtime: Runtime) -> None:
    prompt = "Once"
    text = "".join(runtime.generate(prompt, max_tokens=20, seed=4, top_p=0.9))
    engine = runtime.engine()
    assert text == finish(engine, runtime.request(prompt, max_tokens=20, seed=4, top_p=0.9))[0].text
    assert text == "".join(runtime.generate(runtime.tokenizer.encode(prompt), max_tokens=20, seed=4, top_p=0.9))
    with pytest.raises(OptionError, match="did you mean top_p"):
        runtime.generate(prompt, top_q=0.9)  # before the first piece is asked for


def test_a_batch_gives_texts_in_the_order_of_their_prompts(runtime: Runtime) -> None:
    prompts = ["a" * (50 - 7 * i) for i in range(7)]
    texts = runtime.generate_batch(prompts, rows=3, max_tokens=12, seed=5)
    assert texts == ["".join(runtime.generate(p, max_tokens=12, seed=5 + i)) for i, p in enumerate(prompts)]
    assert runtime.generate_batch([]) == []


def test_a_text_that_nobody_reads_on_is_given_up_at_once(runtime: Runtime) -> None:
    for _piece in runtime.generate("Once", max_tokens=3000):
        break
    assert runtime.engine().active == []
    unread = runtime.generate("Once", max_tokens=5)
    unread.close()
    assert ([*unread], unread.generation.finish) == ([], "cancelled")


def test_threads_may_share_a_runtime(runtime: Runtime) -> None:
    def write(seed: int) -> str:
        return "".join(runtime.generate(f"{seed}", max_tokens=12, seed=seed))

    alone = [write(seed) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(write, [*range(4)] * 4)] == alone * 4
    finally:
        sys.setswitchinterval(interval)


def test_a_stop_that_is_no_text_is_refused_and_leaves_nothing_behind(runtime: Runtime) -> None:
    for stop in (b"\n", [1], 5, None):
        with pytest.raises(OptionError, match="stop is a text or a list of texts"):
            runtime.generate("Once", stop=stop)  # type: ignore[arg-type]
    assert "".join(runtime.generate("Once", max_tokens=2, stop=[])) != ""


def test_a_batch_of_no_rows_or_of_one_text_is_refused(runtime: Runtime) -> None:
    for rows in (0, -1, 2.0):
        with pytest.raises(OptionError, match=f"rows is a whole number from 1, not {rows}"):
            runtime.generate_batch(["a"], rows=rows)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="prompts is a list of texts, not a text"):
        runtime.generate_batch("abc")
    for prompt in (None, b"bytes"):
        with pytest.raises(OptionError, match="token ids are a list of whole numbers"):
            runtime.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seed is a whole number, not 'x'"):
        runtime.generate_batch(["a"], seed="x")  # type: ignore[arg-type]


def test_a_batch_that_fails_leaves_nothing_running(runtime: Runtime) -> None:
    runtime.plugins = type(runtime.plugins).load({"RWKV_PLUGINS": ""})
    runtime.plugins.samplers.add(Poisoned(), "test")
    with pytest.raises(SamplingError):
        runtime.generate_batch(["a", "b", "c"], sampler="poisoned", rows=2, at=3)
    engine = runtime.engine("poisoned", 2)
    assert (engine.active, list(engine.waiting), engine.prefilling) == ([], [], None)

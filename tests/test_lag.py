"""Tokens read one step behind: the device is never waited for, and nothing that is written or kept is another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from engines import Counting, Poisoned, Scripted, finish
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_samplers.greedy import Greedy
from rwkv_samplers.nucleus import Nucleus

from rwkv_runtime import PluginError
from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine, usual_lag
from rwkv_runtime.flight import Flight
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.sampler import Sampler
from rwkv_runtime.tokenizer import Tokenizer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

LETTERS = tuple(map(chr, range(33, 127)))
# Ends of every kind, some foreseen and some not, in rows that move when others end.
REQUESTS = [
    Request(tokens_of(3), max_tokens=9, seed=1, keep=True),
    Request(tokens_of(9), max_tokens=40, seed=2, keep=True, stop=LETTERS),
    Request(tokens_of(2), {"at": 5}, max_tokens=30, seed=3, keep=True),
    Request(tokens_of(30), max_tokens=1, seed=4, keep=True),
    Request(tokens_of(5), max_tokens=25, seed=5),
    Request(tokens_of(6), max_tokens=12, seed=6, observe=2),
    Request(tokens_of(700), max_tokens=18, seed=7, keep=True, stop=LETTERS),
]


def behind(model: Model, tokenizer: Tokenizer, sampler: Sampler, rows: int = 1, lag: int = 1) -> Engine:
    return Engine(model, Eager(), sampler, tokenizer, rows, lag)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_and_what_is_kept_of_them_are_the_same(rows: int, model: Model, tokenizer: Tokenizer) -> None:
    at_once, later = (finish(behind(model, tokenizer, Poisoned(), rows, lag), *REQUESTS) for lag in (0, 1))
    assert {"length", "stop", "error"} <= {generation.finish for generation in at_once}
    for a, b in zip(at_once, later, strict=True):
        assert (a.tokens, a.text, a.finish, a.position) == (b.tokens, b.text, b.finish, b.position)
        assert [o.token for o in a.observations] == [o.token for o in b.observations]
        check_kept(a, b)


def check_kept(a: Generation, b: Generation) -> None:
    for ours, theirs in ((a.snapshot, b.snapshot), (a.prompt_snapshot, b.prompt_snapshot)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.pending, ours.position, ours.recent) == (theirs.pending, theirs.position, theirs.recent)
            for name, t in ours.state.tensors.items():
                torch.testing.assert_close(t, theirs.state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("others", [0, 2])
def test_a_kept_state_has_read_what_was_written_and_no_more(others: int, model: Model, tokenizer: Tokenizer) -> None:
    """Whichever way the text ended, it goes on from there as if it had not."""
    script = [*(byte + 1 for byte in b"abcdefg"), 0]
    beside = [Request(tokens_of(4, seed), max_tokens=3 + seed) for seed in range(others)]
    for ended in (Request([9], stop=("e",), keep=True), Request([9], keep=True), Request([9], max_tokens=4, keep=True)):
        *_, generation = finish(behind(model, tokenizer, Scripted(script), rows=1 + others), *beside, ended)
        assert generation.snapshot is not None
        read = [9, *generation.tokens]
        assert (generation.snapshot.pending, generation.snapshot.position) == (tuple(read[-1:]), len(read) - 1)
        expected = model.new_state()
        model.architecture.forward(model.architecture.ops, model.weights, torch.tensor([read[:-1]]), expected)
        for name, t in expected.tensors.items():
            torch.testing.assert_close(generation.snapshot.state[name], t, rtol=1e-4, atol=1e-5)


def test_leaving_early_keeps_what_was_given(model: Model, tokenizer: Tokenizer) -> None:
    engine = behind(model, tokenizer, Nucleus(), rows=2)
    other = engine.submit(Request([4], max_tokens=20, seed=8))
    left = engine.submit(Request([5], max_tokens=50, seed=9, keep=True))
    while len(left.tokens) < 7:
        engine.step()
    engine.cancel(left)
    assert left.snapshot is not None
    whole = finish(behind(model, tokenizer, Nucleus()), Request([5], max_tokens=50, seed=9))[0]
    rest = finish(engine, Request(max_tokens=43, seed=9, start=left.snapshot))[0]
    assert left.tokens + rest.tokens == whole.tokens
    assert other.tokens == finish(behind(model, tokenizer, Nucleus()), Request([4], max_tokens=20, seed=8))[0].tokens


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an engine does, in order: starting a step, reading tokens."""
    noted: list[str] = []
    read, start = Flight.tokens, Flight.start

    def tokens(self: Flight) -> list[int]:
        noted.append("read")
        return read(self)

    def started(self: Flight, generations: Sequence[Generation]) -> None:
        noted.append("start")
        start(self, generations)

    monkeypatch.setattr(Flight, "tokens", tokens)
    monkeypatch.setattr(Flight, "start", started)
    return noted


def test_a_step_is_started_before_the_tokens_of_the_last_are_read(
    events: list[str], model: Model, tokenizer: Tokenizer
) -> None:
    finish(behind(model, tokenizer, Greedy(), lag=0), Request([5], max_tokens=4))
    assert events == ["start", "read"] * 4
    events.clear()
    finish(behind(model, tokenizer, Greedy()), Request([5], max_tokens=4))
    assert events == ["start", *["start", "read"] * 3, "read"]  # an end that was foreseen costs no step


def test_an_end_that_was_not_foreseen_costs_one_step(events: list[str], model: Model, tokenizer: Tokenizer) -> None:
    generation = finish(behind(model, tokenizer, Scripted(b"abcdef")), Request([5], stop=("d",)))[0]
    assert (generation.text, events.count("start"), len(generation.tokens)) == ("abc", 5, 4)


def test_steps_that_are_watched_are_read_at_once(events: list[str], model: Model, tokenizer: Tokenizer) -> None:
    engine = behind(model, tokenizer, Greedy(), rows=2)
    plain = engine.submit(Request([5], max_tokens=9))
    for _ in range(3):
        engine.step()
    events.clear()
    watched = finish(engine, Request([6], max_tokens=3, observe=2))[0]
    assert events == ["read", *["start", "read"] * 3]
    assert [o.token for o in watched.observations] == watched.tokens
    while plain.finish is None:
        engine.step()
    assert plain.tokens == finish(behind(model, tokenizer, Greedy()), Request([5], max_tokens=9))[0].tokens


def test_the_lag_is_one_on_a_gpu_unless_the_host_samples() -> None:
    host = Nucleus()
    host.runs = "host"
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (usual_lag(cpu, Nucleus()), usual_lag(cuda, Nucleus()), usual_lag(cuda, host)) == (0, 1, 0)


class Breaking(Greedy):
    """Fails at its fourth step, as a stranger's sampler may."""

    runs = "host"
    count = 0

    def sample(self, logits: torch.Tensor, controls: Controls) -> torch.Tensor:
        self.count += 1
        if self.count == 4:
            raise ValueError("no more")
        return super().sample(logits, controls)


def test_a_step_that_fails_says_whose_fault_it_is(model: Model, tokenizer: Tokenizer) -> None:
    engine = behind(model, tokenizer, Breaking())
    generation = engine.submit(Request([5]))
    with pytest.raises(PluginError, match=r"a step failed .*: ValueError: no more"):
        list(engine.stream(generation))
    assert (generation.finish, len(generation.tokens), engine.active) == ("cancelled", 2, [])


def prompt_tokens_between_steps(reads: list[tuple[int, int]]) -> Iterator[int]:
    """How many tokens of prompts were read before each decode step, from a backend's record of [B, T]."""
    since = 0
    for _, length in reads:
        if length > 1:
            since += length
        else:
            yield since
            since = 0


def test_admitting_requests_never_stalls_the_others_by_more_than_a_chunk(
    lag: int, model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_runtime.engine.chunk_size", lambda device, waited_for: 64)
    backend = Counting()
    engine = Engine(model, backend, Greedy(), tokenizer, rows=6)
    writing = engine.submit(Request([5], max_tokens=200))
    engine.step()
    backend.reads.clear()
    lengths = [300, 3, 65, 200, 5, 64, 120]  # some fill their chunks, some do not; more than there are rows
    new = [engine.submit(Request(tokens_of(length), max_tokens=4)) for length in lengths]
    steps = 0
    while any(generation.finish is None for generation in new):
        engine.step()
        steps += 1
        assert len(writing.tokens) == 1 - lag + steps  # one token a step, whatever else goes on
    stalls = list(prompt_tokens_between_steps(backend.reads))
    assert len(stalls) == steps
    assert max(stalls) == 64
    assert sum(stalls) == sum(lengths) - len(lengths)


@needs_cuda
def test_on_a_gpu_tokens_travel_through_pinned_memory() -> None:
    from rwkv_runtime.testing import tiny_model

    runtime = tiny_model(device="cuda")
    engine = runtime.engine("nucleus", rows=3)
    assert engine.lag == 1
    assert all(flight._tokens.is_pinned() for flight in engine._flights)
    requests = [replace(request, prompt=request.prompt[:20]) for request in REQUESTS if not request.params]
    at_once = Engine(runtime.model, runtime.backend, Nucleus(), runtime.tokenizer, 3, lag=0)
    for a, b in zip(finish(at_once, *requests), finish(engine, *requests), strict=True):
        assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish)
        check_kept(a, b)

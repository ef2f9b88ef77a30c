"""The engine: many texts in one batch, each as if it were alone, told apart only by what was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from engines import Counting, Once, Poisoned, Scripted, finish
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_samplers.greedy import Greedy
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

from rwkv_runtime.backend import chunk_size
from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError, SamplingError, StateError
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Model
from rwkv_runtime.sampler import Chain, Param, Sampler
from rwkv_runtime.snapshot import Snapshot
from rwkv_runtime.state import State
from rwkv_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("lag")

# Prompts of no, one and many tokens; long and short texts; so that rows come and go at different times.
REQUESTS = [
    Request(tokens_of(length, seed), {}, max_tokens=count, seed=seed)
    for seed, (length, count) in enumerate([(3, 9), (0, 25), (40, 4), (1, 17), (700, 6), (17, 1), (16, 30), (2, 2)])
]


def engine_for(model: Model, tokenizer: Tokenizer, sampler: Sampler, rows: int = 1) -> Engine:
    return Engine(model, Eager(), sampler, tokenizer, rows)


@pytest.mark.parametrize("sampler", [Greedy(), Nucleus(), Chain([Once(), Nucleus()])], ids=lambda s: s.name)
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_text_is_the_same_beside_others_as_alone(
    sampler: Sampler, rows: int, model: Model, tokenizer: Tokenizer
) -> None:
    alone = engine_for(model, tokenizer, sampler)
    expected = [finish(alone, request)[0] for request in REQUESTS]
    together = finish(engine_for(model, tokenizer, sampler, rows), *REQUESTS)
    assert [g.tokens for g in together] == [g.tokens for g in expected]
    assert [g.text for g in together] == [g.text for g in expected]
    assert [len(g.tokens) for g in together] == [r.max_tokens for r in REQUESTS]


def test_rows_at_work_are_the_first_ones_and_are_given_back(model: Model, tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tokenizer, Nucleus(), rows=3)
    generations = [engine.submit(request) for request in REQUESTS]
    most = 0
    while any(g.finish is None for g in generations):
        engine.step()
        most = max(most, len(engine.active))
        assert len(engine.active) <= 3
    assert most == 3
    assert (engine.active, list(engine.waiting), engine.prefilling) == ([], [], None)


def test_parameters_and_seeds_are_each_rows_own(model: Model, tokenizer: Tokenizer) -> None:
    greedy = finish(engine_for(model, tokenizer, Greedy()), Request([5], max_tokens=12))[0]
    cold, hot, again, other = finish(
        engine_for(model, tokenizer, Nucleus(), rows=4),
        Request([5], {"temperature": 0}, max_tokens=12),
        Request([5], {"temperature": 1.5, "top_p": 1.0}, max_tokens=12, seed=3),
        Request([5], {"temperature": 1.5, "top_p": 1.0}, max_tokens=12, seed=3),
        Request([5], {"temperature": 1.5, "top_p": 1.0}, max_tokens=12, seed=4),
    )
    assert cold.tokens == greedy.tokens
    assert hot.tokens == again.tokens
    assert len({tuple(g.tokens) for g in (cold, hot, other)}) == 3


def test_samplers_draw_the_same_wherever_they_run(model: Model, tokenizer: Tokenizer) -> None:
    texts = []
    for where in ("graph", "device", "host"):
        sampler = Nucleus()
        sampler.runs = where
        texts.append([g.tokens for g in finish(engine_for(model, tokenizer, sampler, 2), *REQUESTS[:4])])
    assert texts[0] == texts[1] == texts[2]


def test_ids_that_the_vocabulary_lacks_are_never_drawn(model: Model, tokenizer: Tokenizer) -> None:
    wild = {"temperature": 1000.0, "top_p": 1.0}
    generations = finish(
        engine_for(model, tokenizer, Nucleus(), rows=8),
        *(Request([1], wild, max_tokens=150, seed=seed) for seed in range(8)),
    )
    drawn = {token for g in generations for token in g.tokens}
    assert len(drawn) > 200
    assert max(drawn) <= 256


@pytest.mark.parametrize("token", [258, 260, -7, 1 << 40])
def test_a_sampler_that_draws_what_is_not_there_fails_its_row_alone(
    token: int, model: Model, tokenizer: Tokenizer
) -> None:
    script = [*(byte + 1 for byte in b"abcdefgh"), token, 66]
    engine = engine_for(model, tokenizer, Scripted(script), rows=2)
    bad, good = finish(engine, Request(tokens_of(7), max_tokens=9), Request([5], max_tokens=7))
    assert (bad.text, bad.finish) == ("gh", "error")
    assert (good.text, good.finish) == ("abcdefg", "length")


@pytest.mark.parametrize("poison", [0, 1, 2])
def test_a_row_that_fails_says_so_and_leaves_the_others(poison: int, model: Model, tokenizer: Tokenizer) -> None:
    healthy = finish(engine_for(model, tokenizer, Poisoned(), 3), *REQUESTS[:3])
    requests = [REQUESTS[0], Request(REQUESTS[1].prompt, {"at": 7, "poison": poison}, 25, 1), REQUESTS[2]]
    engine = engine_for(model, tokenizer, Poisoned(), 3)
    first, bad, last = finish(engine, *requests)
    assert (first.tokens, last.tokens) == (healthy[0].tokens, healthy[2].tokens)
    assert bad.tokens == healthy[1].tokens[:7]
    assert (bad.finish, bad.snapshot) == ("error", None)
    with pytest.raises(SamplingError, match="token 8 of this text cannot be drawn"):
        list(engine.stream(bad))
    assert finish(engine, REQUESTS[1])[0].tokens == healthy[1].tokens  # the row serves again


def test_logits_that_are_not_finite_fail_their_row_alone(model: Model, tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tokenizer, Greedy(), rows=2)
    spoiled = Snapshot(State({n: t.clone() for n, t in model.new_state().tensors.items()}), (5,), 0)
    spoiled.state["att_kv"].fill_(torch.nan)
    bad, good = finish(engine, Request(start=spoiled), Request([5], max_tokens=12))
    assert (bad.finish, bad.tokens) == ("error", [])
    assert good.tokens == finish(engine_for(model, tokenizer, Greedy()), Request([5], max_tokens=12))[0].tokens


def test_a_prompt_is_read_in_chunks_while_others_write(model: Model, tokenizer: Tokenizer, lag: int) -> None:
    backend = Counting()
    chunk = chunk_size(model.device)
    engine = Engine(model, backend, Greedy(), tokenizer, rows=2)
    short = engine.submit(Request([5], max_tokens=50))
    for _ in range(1 + lag):
        engine.step()
    long = engine.submit(Request(tokens_of(3 * chunk + 10), max_tokens=2))
    for step in range(1, 4):
        engine.step()
        assert len(short.tokens) == 1 + step
        assert long.tokens == []
    for _ in range(1 + lag):
        engine.step()
    assert len(long.tokens) == 1
    assert max(count for _, count in backend.reads) == chunk
    assert backend.prompt_tokens == 3 * chunk + 9


def test_a_gpu_reads_larger_chunks_the_largest_where_nobody_waits() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert chunk_size(cuda) > chunk_size(cuda, waited_for=True) > chunk_size(cpu)
    assert chunk_size(cpu, waited_for=True) == chunk_size(cpu)


def test_a_prompt_is_read_in_shorter_chunks_while_others_write(
    model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_runtime.engine.chunk_size", lambda device, waited_for: 16 if waited_for else 32)
    backend = Counting()
    engine = Engine(model, backend, Greedy(), tokenizer, rows=2)
    finish(engine, Request(tokens_of(1 + 64), max_tokens=2))
    assert [tokens for _, tokens in backend.reads if tokens > 1] == [32, 32]
    backend.reads.clear()
    engine.submit(Request([5], max_tokens=50))
    engine.step()
    finish(engine, Request(tokens_of(1 + 48), max_tokens=2))
    assert [tokens for _, tokens in backend.reads if tokens > 1] == [16, 16, 16]


def test_trials_start_from_one_reading_of_the_prompt(model: Model, tokenizer: Tokenizer) -> None:
    backend = Counting()
    engine = Engine(model, backend, Nucleus(), tokenizer)
    prompt = tokens_of(100)
    first = finish(engine, Request(prompt, max_tokens=9, seed=1, keep=True))[0]
    assert backend.prompt_tokens == 99
    for seed in (1, 2, 1):
        again = finish(engine, Request(max_tokens=9, seed=seed, start=first.prompt_snapshot))[0]
        assert (again.tokens == first.tokens) == (seed == 1)
    assert backend.prompt_tokens == 99


@pytest.mark.parametrize("sampler", [Greedy(), Nucleus()], ids=lambda s: s.name)
def test_a_text_goes_on_from_where_it_stood(sampler: Sampler, model: Model, tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tokenizer, sampler)
    whole = finish(engine, Request(tokens_of(20), max_tokens=30, seed=2))[0]
    half = finish(engine, Request(tokens_of(20), max_tokens=13, seed=2, keep=True))[0]
    rest = finish(engine, Request(max_tokens=17, seed=2, start=half.snapshot))[0]
    assert half.tokens + rest.tokens == whole.tokens
    more = finish(engine, Request(tokens_of(5, 9), max_tokens=6, seed=2, start=half.snapshot))[0]
    told = finish(engine, Request([*tokens_of(20), *half.tokens, *tokens_of(5, 9)], max_tokens=6, seed=2))[0]
    assert more.tokens == told.tokens
    assert more.position == told.position


def test_what_is_kept_is_not_changed_by_going_on(model: Model, tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tokenizer, Greedy(), rows=2)
    first = finish(engine, Request(tokens_of(20), max_tokens=5, keep=True))[0]
    assert first.snapshot is not None
    before = first.snapshot.state.clone()
    finish(engine, *(Request(tokens_of(3), max_tokens=9, start=first.snapshot) for _ in range(3)))
    assert all(torch.equal(t, before[name]) for name, t in first.snapshot.state.tensors.items())


class Picky(Greedy):
    """Raises what it should not, where a request is made or a row begins; reads its text on the host at each step."""

    name = "picky"
    params = {"pick": Param(0), "word": Param("a")}
    runs = "host"

    def check(self, params: Mapping[str, float | str]) -> None:
        if float(params["pick"]) % 2:
            raise ValueError(f"{params['pick']} is odd")

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        int(controls.notes[0]["word"], 16)

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        assert all(note["word"] for note in controls.notes)
        return super().sample(logits, controls)


def test_what_a_sampler_raises_at_a_rows_start_costs_that_row_alone(model: Model, tokenizer: Tokenizer) -> None:
    """Rows in which no text is written have texts, too: those of the defaults."""
    engine = engine_for(model, tokenizer, Picky(), rows=5)
    words = ["a", "zz", "b"]
    first, bad, last = finish(engine, *(Request([1], {"word": word}, max_tokens=4) for word in words))
    assert (first.finish, bad.finish, last.finish) == ("length", "error", "length")
    assert str(bad.error).startswith("sampler picky cannot begin: ValueError: invalid literal")


def test_a_request_that_cannot_be_met_is_refused_when_it_is_made(model: Model, tokenizer: Tokenizer) -> None:
    engine = engine_for(model, tokenizer, Nucleus())
    for request, reason in (
        (Request(max_tokens=0), "max_tokens is a whole number from 1, not 0"),
        (Request([260]), "token id 260 is not in the model's vocabulary of 260"),
        (Request([-1]), "token id -1"),
        (Request(seconds="5"), "seconds is a number above 0, not '5'"),  # type: ignore[arg-type]
        (Request(seconds=0.0), "seconds is a number above 0, not 0.0"),
        (Request(seconds=math.nan), "seconds is a number above 0, not nan"),
        (Request(params={"top_k": -1}), "top_k is a whole number"),
        (Request(params={"topp": 1}), "did you mean top_p"),
    ):
        with pytest.raises(OptionError, match=reason):
            engine.submit(request)
    with pytest.raises(OptionError, match="sampler picky cannot take these: ValueError: 7 is odd"):
        engine_for(model, tokenizer, Picky()).submit(Request(params={"pick": 7}))
    with pytest.raises(StateError, match="another architecture"):
        engine.submit(Request(start=Snapshot(State({"x": torch.zeros(1, 1)}), (1,), 0)))
    assert not engine.waiting

"""Samplers that remember: what they do to a text, token by token, and that no row's memory reaches another."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engines import finish
from helpers import byte_tokenizer, controls_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_backends.eager import Eager
from rwkv_samplers import dry
from rwkv_samplers.bias import Banned, LogitBias
from rwkv_samplers.dry import WINDOW, Dry
from rwkv_samplers.mirostat import Mirostat
from rwkv_samplers.penalties import Penalties, RwkvAlpha
from torch import Tensor

from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError
from rwkv_runtime.generation import Generation, Request
from rwkv_runtime.model import Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.sampler import Sampler
from rwkv_runtime.tokenizer import Tokenizer

V = 6
INF = math.inf
texts = st.lists(st.integers(0, 3), max_size=24)


def filtered(
    sampler: Sampler, prompt: Sequence[int], output: Sequence[int], logits: Tensor, **params: object
) -> Tensor:
    """What the sampler makes of the logits [V] after a prompt and an output, one token after the other."""
    controls = controls_of(sampler, 1, len(logits), **params)
    sampler.prime(torch.tensor(prompt, dtype=torch.int64), controls)
    for token in output:
        sampler.update(torch.tensor([token]), logits[None], controls)
    return sampler.filter(logits[None], controls)[0]


@settings(deadline=None, max_examples=60)
@given(texts, texts, st.sampled_from([1.0, 1.3, 0.5]), st.sampled_from([0.0, 0.7, -2.0]), st.sampled_from([0.0, 0.25]))
def test_penalties_are_those_of_hugging_face_and_openai(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -INF, 3.0])
    expected = logits.tolist()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token in output:
        expected[token] -= frequency
    for token in {*output}:
        expected[token] -= presence
    ours = filtered(Penalties(), prompt, output, logits, repetition=repetition, presence=presence, frequency=frequency)
    assert ours.tolist() == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(texts, st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.5, 0.996, 1.0]))
def test_alpha_penalties_are_those_of_the_rwkv_package(
    output: list[int], presence: float, frequency: float, decay: float
) -> None:
    occurrence: dict[int, float] = {}
    for token in output:
        occurrence = {n: c * decay for n, c in occurrence.items()}
        occurrence[token] = occurrence.get(token, 0.0) + 1
    expected = [1.0] * V
    for token, count in occurrence.items():
        expected[token] -= presence + count * frequency
    params = {"alpha_presence": presence, "alpha_frequency": frequency, "alpha_decay": decay}
    ours = filtered(RwkvAlpha(), [0, 1, 2], output, torch.ones(V), **params)  # the prompt does not count
    assert ours.tolist() == pytest.approx(expected, abs=1e-5)


def plain_dry(text: list[int], multiplier: float, base: float, allowed: int, window: int) -> list[float]:
    """For each earlier place: how far does what ends there equal the end of the text? Then lower what follows it."""
    text = text[max(len(text) - window, 0) :]
    penalty = [0.0] * V
    for end in range(len(text) - 1):
        n = 0
        while n <= end and text[end - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= allowed:
            penalty[text[end + 1]] = max(penalty[text[end + 1]], multiplier * base ** (n - allowed))
    return penalty


@settings(deadline=None, max_examples=120)
@given(texts, texts, st.integers(1, 4), st.sampled_from([0, 1, 5, 12, WINDOW]))
def test_dry_lowers_what_would_go_on_with_a_repetition(
    prompt: list[int], output: list[int], allowed: int, window: int
) -> None:
    params = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": allowed, "dry_window": window}
    ours = filtered(Dry(), prompt, output, torch.zeros(V), **params)
    expected = plain_dry(prompt + output, 0.8, 1.75, allowed, window)
    assert (-ours).tolist() == pytest.approx(expected, rel=1e-5)


def test_dry_forgets_what_is_beyond_its_window() -> None:
    text = [1, 2, 3] + [0] * (WINDOW - 5) + [1, 2]
    kept = filtered(Dry(), text, [], torch.zeros(V))
    assert int(kept.argmin()) == 3
    assert bool((filtered(Dry(), text, [0, 1, 2], torch.zeros(V))[3] == 0).item())


def test_dry_does_not_reach_across_breakers(tokenizer: Tokenizer) -> None:
    for text, lowered in (("abc ab", True), ("a:c a:", False), ("a:bc a:b", False), ("x\nabc x\nab", True)):
        for split in range(len(text)):
            controls = replace(controls_of(Dry(), 1, 260), tokenizer=tokenizer)
            ids = tokenizer.encode(text)
            Dry().prime(torch.tensor(ids[:split], dtype=torch.int64), controls)
            for token in ids[split:]:
                Dry().update(torch.tensor([token]), torch.zeros(1, 260), controls)
            kept = Dry().filter(torch.zeros(1, 260), controls)
            assert bool((kept < 0).any()) == lowered, (text, split)


def test_dry_looks_through_a_vocabulary_once_for_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bytes] = []
    holding = dry._holding

    def watched(tokenizer: Tokenizer, characters: bytes, vocab_size: int) -> list[int]:
        looks.append(characters)
        return holding(tokenizer, characters, vocab_size)

    monkeypatch.setattr(dry, "_holding", watched)
    sampler, vocabulary = Dry(), byte_tokenizer()
    tables = []
    for breakers in (":", ":", ",", ":"):
        controls = replace(controls_of(sampler, 1, 260, dry_breakers=breakers), tokenizer=vocabulary)
        sampler.prime(torch.tensor([5]), controls)
        tables.append(controls.slots["dry_breaks"][0].nonzero().flatten().tolist())
    assert tables == [[1 + ord(breakers)] for breakers in (":", ":", ",", ":")]
    assert looks == [b":", b","]
    for i in range(20):  # a stranger's settings do not pile up
        sampler._breaking(vocabulary, b"%d" % i, 260)
    assert len(sampler._breaks[vocabulary]) == dry.TABLES
    del vocabulary, controls
    gc.collect()
    assert len(sampler._breaks) == 0  # nor do vocabularies


def test_a_harsh_dry_still_leaves_something() -> None:
    params = {"dry_multiplier": 100.0, "dry_base": 10.0, "dry_allowed_length": 1}
    kept = filtered(Dry(), [0] * 500, [], torch.zeros(1), **params)
    assert bool(kept.isfinite().all())
    kept = filtered(Dry(), [0] * 500, [], torch.zeros(1), **params | {"dry_multiplier": 0.0})
    assert kept.tolist() == [0.0]


def test_mirostat_steers_its_bound() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    tau, eta, mu = 1.5, 0.4, 3.0
    output = [0, 0, 3, 1, 0, 0, 0, 2, 0]
    for count in range(len(output)):
        kept = filtered(Mirostat(), [], output[:count], logits, mirostat_tau=tau, mirostat_eta=eta)
        surprise = [1.0, 2.0, 3.0, 3.0]
        assert [bool(x) for x in kept.isfinite()] == [s <= mu + 1e-5 or s == 1.0 for s in surprise]
        mu -= eta * (surprise[output[count]] - tau)


def test_mirostat_holds_the_surprise_near_its_target() -> None:
    """On a distribution that never changes, the mean surprise of a long text comes to tau."""
    logits = -1.2 * torch.arange(1, 501).log()[None]
    for tau in (2.5, 3.5):
        sampler = Mirostat()
        controls = controls_of(sampler, 1, 500, mirostat_tau=tau, mirostat_eta=0.1, seed=3)
        surprise = []
        for _ in range(1500):
            token = sampler.sample(logits, controls)
            surprise.append(-torch.log_softmax(logits, -1)[0, token].item() / math.log(2))
            sampler.update(token, logits, controls)
            controls.position.add_(1)
        assert sum(surprise) / len(surprise) == pytest.approx(tau, abs=0.15)


def test_bias_and_bans_are_by_token() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, -INF, 0.0, 0.0])
    ours = filtered(LogitBias(), [], [], logits, bias=" 1:-1.5, 3:20,4:2 ")
    assert ours.tolist() == [1.0, 0.5, 3.0, -INF, 2.0, 0.0]
    assert filtered(Banned(), [], [], logits, banned="1,2").tolist() == [1.0, -INF, -INF, -INF, 0.0, 0.0]
    assert filtered(Banned(), [], [], logits, banned="").tolist() == logits.tolist()
    assert filtered(LogitBias(), [], [], logits, bias="0:3e38,1:-3e38").isfinite().sum() == 5


@pytest.mark.parametrize(
    ("sampler", "params", "reason"),
    [
        (LogitBias(), {"bias": "5"}, "bias is a list like 13:-1.5,20:2, and '5' is no token id with a number"),
        (LogitBias(), {"bias": "5:much"}, "'5:much' is no token id with a number"),
        (LogitBias(), {"bias": "5:inf"}, "'5:inf' is no token id with a number"),
        (LogitBias(), {"bias": "1:nan"}, "'1:nan' is no token id with a number"),
        (LogitBias(), {"bias": "6:1"}, "bias names token ids from 0 to 5, and '6' is none"),
        (Banned(), {"banned": "1,-2"}, "banned names token ids from 0, and '-2' is none"),
        (Banned(), {"banned": "²"}, "and '²' is none"),
        (Banned(), {"banned": "1 2"}, "and '1 2' is none"),
    ],
)
def test_what_is_no_list_of_tokens_is_refused(sampler: Sampler, params: dict[str, str], reason: str) -> None:
    with pytest.raises(OptionError, match=reason.replace("(", r"\(")):
        filtered(sampler, [], [], torch.zeros(V), **params)


SETTINGS: dict[str, list[dict[str, object]]] = {
    "penalties,dry,mirostat": [
        {"repetition": 1.3, "presence": 0.5, "frequency": 0.3},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1, "mirostat_tau": 2.0},
        {"mirostat_tau": 7.0, "dry_multiplier": 0.0},
        {"repetition": 0.5, "dry_window": 5, "dry_allowed_length": 1},
    ],
    "logit-bias,banned,rwkv-alpha,xtc,standard": [
        {"bias": "33:4,34:4", "temperature": 0.7},
        {"banned": ",".join(map(str, range(1, 200))), "top_k": 20},
        {"alpha_frequency": 2.0, "alpha_presence": 1.0, "top_p": 0.5},
        {"temperature": 0.0},
    ],
    "nucleus": [{"top_p": 0.3}, {"temperature": 3.0, "top_p": 1.0}, {"top_k": 4}, {"temperature": 0.0}],
}


@pytest.mark.parametrize("chain", SETTINGS)
def test_a_seeded_text_is_the_same_alone_and_beside_any_others(
    chain: str, model: Model, tokenizer: Tokenizer, plugins: Plugins
) -> None:
    """In any row, from a row that moves when others end, whatever the others ask for."""
    sampler = plugins.sampler(chain)
    requests = [
        Request(tokenizer.encode(f"text {i}" * i), params, max_tokens=length, seed=i)
        for i, (params, length) in enumerate(zip(SETTINGS[chain], (5, 30, 12, 24), strict=True))
    ]
    alone = Engine(model, Eager(), sampler, tokenizer)
    expected = [finish(alone, request)[0].tokens for request in requests]
    assert all(expected)
    batch = Engine(model, Eager(), sampler, tokenizer, rows=3)  # one waits, and others move up
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        done = finish(batch, *(requests[i] for i in order))
        assert [generation.tokens for generation in done] == [expected[i] for i in order]


def test_prompts_are_remembered_also_after_a_snapshot(model: Model, tokenizer: Tokenizer, plugins: Plugins) -> None:
    """Two texts from one prompt's snapshot are those of the whole prompt."""
    engine = Engine(model, Eager(), plugins.sampler("penalties,dry,standard"), tokenizer)
    prompt, params = tokenizer.encode("one and one and one"), {"repetition": 0.02, "dry_allowed_length": 1}
    whole = finish(engine, Request(prompt, params, max_tokens=10, seed=4))[0]
    read = finish(engine, Request(prompt, params, max_tokens=1, seed=9, keep=True))[0]
    again = finish(engine, Request((), params, max_tokens=10, seed=4, start=read.prompt_snapshot))[0]
    assert again.tokens == whole.tokens
    without = finish(engine, Request(prompt, params | {"repetition": 1.0}, max_tokens=10, seed=4))[0]
    assert whole.tokens != without.tokens


def test_a_setting_that_cannot_be_honoured_costs_its_row_alone(
    model: Model, tokenizer: Tokenizer, plugins: Plugins
) -> None:
    engine = Engine(model, Eager(), plugins.sampler("banned"), tokenizer, rows=2)
    every = ",".join(map(str, range(260)))
    bad, fine, none = finish(
        engine,
        Request([5], {"banned": "260"}, max_tokens=3),
        Request([5], {"banned": "0,7"}, max_tokens=3),
        Request([5], {"banned": every}, max_tokens=3),
    )
    assert isinstance(bad.error, OptionError)
    assert (fine.finish, len(fine.tokens)) == ("length", 3)
    assert _says(none, "nothing is left to choose from")


def _says(generation: Generation, text: str) -> bool:
    return generation.finish == "error" and text in str(generation.error)

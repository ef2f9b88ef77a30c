"""What `nucleus` and `greedy` draw from, against the plain algorithm in float64, and the mistakes others made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import chi_squared, controls_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_samplers import nucleus as plain_nucleus
from plain_samplers import softmax
from rwkv_samplers.greedy import Greedy
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

INF = math.inf
SAMPLERS = [Greedy(), Nucleus()]
grid = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=40)
wild = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, INF, -INF, math.nan, 3e38, -3e38, 1e-40, 88.0]), st.floats(-30, 30, width=32)
)


def distribution(sampler: Greedy | Nucleus, logits: Tensor, **params: object) -> Tensor:
    controls = controls_of(sampler, logits.shape[0], logits.shape[1], **params)
    return torch.softmax(sampler.filter(logits, controls), dim=-1)


def nucleus(logits: list[float], **params: object) -> list[float]:
    return distribution(Nucleus(), torch.tensor([logits]), **params)[0].tolist()


@settings(deadline=None, max_examples=200)
@given(
    grid,
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 30.0]),
    st.sampled_from([0.0, 0.1, 0.35, 0.62, 0.8, 0.95, 1.0]),
    st.sampled_from([0, 1, 2, 5, 39, 1000]),
)
def test_nucleus_is_the_plain_algorithm(logits: list[float], temperature: float, top_p: float, top_k: int) -> None:
    ours = nucleus(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    theirs = softmax(plain_nucleus(logits, temperature, top_p, top_k))
    assert sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 2e-3


def test_the_worked_example() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]
    expected = [0.4 / 0.75, 0.3 / 0.75, 0.05 / 0.75, 0.0, 0.0]  # .533 .400 .067: exactly 0.75 is kept
    assert nucleus(logits, top_p=0.75) == pytest.approx(expected, abs=1e-6)


def test_temperature_comes_after_the_choice_of_tokens() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]
    hot = nucleus(logits, top_p=0.69, temperature=1000.0)
    assert hot == pytest.approx([0.5, 0.5, 0.0, 0.0, 0.0], abs=1e-3)


def test_tokens_tied_at_the_cutoff_share_what_is_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.2, 0.2, 0.2)]
    assert nucleus(logits, top_p=0.7) == pytest.approx([0.4 / 0.7, 0.1 / 0.7, 0.1 / 0.7, 0.1 / 0.7], abs=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.9999999])
def test_all_of_a_large_vocabulary_can_be_kept(top_p: float) -> None:
    """A float32 running sum over many tokens never reaches 1; elsewhere that makes P = 1 greedy."""
    logits = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0))
    kept = distribution(Nucleus(), logits, top_p=top_p)
    assert int((kept > 0).sum()) > 65000
    assert float((kept - torch.softmax(logits, -1)).abs().sum()) < 1e-4


@pytest.mark.parametrize("count", [2, 3, 7, 1000, 65536])
@pytest.mark.parametrize("top_p", [1e-30, 1e-6, 0.3, 0.5, 0.9, 0.9999999])
def test_ties_never_leave_negative_weights(count: int, top_p: float) -> None:
    """Elsewhere the adjusted share goes below zero by rounding, and the draw raises."""
    logits = torch.zeros(1, count)
    kept = distribution(Nucleus(), logits, top_p=top_p)
    assert float(kept.min()) >= 0.0
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / count))


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-45])
def test_a_small_temperature_does_not_underflow_to_nothing(temperature: float) -> None:
    logits = [1.0, 3.0, 2.5, -60.0]
    assert nucleus(logits, temperature=temperature, top_p=1.0) == pytest.approx([0.0, 1.0, 0.0, 0.0], abs=1e-9)
    assert nucleus([2.0, 2.0, 1.0], temperature=temperature, top_p=1.0) == pytest.approx([0.5, 0.5, 0.0])


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30))
def test_temperature_zero_and_top_p_zero_are_greedy(logits: list[float]) -> None:
    best = logits.index(max(logits))
    z = torch.tensor([logits])
    assert Greedy().sample(z, controls_of(Greedy(), 1, len(logits))).tolist() == [best]
    for off in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"top_p": 1e-60}):
        assert Nucleus().sample(z, controls_of(Nucleus(), 1, len(logits), **off)).tolist() == [best]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 0.0, 7.0], [0.0, -0.0, 0.0, -0.0, -1.0]])
    assert Greedy().sample(logits, controls_of(Greedy(), 2, 5)).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_also_among_equals() -> None:
    logits = [1.0, 2.0, 2.0, 2.0, 2.0]
    for k in (1, 2, 3, 4):
        kept = nucleus(logits, top_k=k, top_p=1.0)
        assert [i for i, p in enumerate(kept) if p > 0] == list(range(1, k + 1))
    for k in (0, 5, 6, 1 << 31):
        assert nucleus(logits, top_k=k, top_p=1.0) == pytest.approx(torch.softmax(torch.tensor(logits), -1).tolist())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(wild, min_size=6, max_size=6), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 2.0, 1000.0]),
    top_p=st.sampled_from([0.0, 1e-7, 0.5, 0.9999999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 6, 1 << 31]),
)
def test_any_logits_give_a_token_that_may_be_drawn_or_a_failed_row(
    sampler: Greedy | Nucleus, rows: list[list[float]], temperature: float, top_p: float, top_k: int
) -> None:
    logits = torch.tensor(rows)
    params = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if sampler.params else {}
    before = logits.clone()
    drawn = sampler.sample(logits, controls_of(sampler, len(rows), 6, **params)).tolist()
    assert torch.equal(logits.nan_to_num(9.0), before.nan_to_num(9.0))
    for row, token in zip(logits, drawn, strict=True):
        if bool(row.isnan().any()) or not math.isfinite(float(row.max())):
            assert token == -1
        else:
            assert 0 <= token < 6
            assert float(row[token]) > -INF


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
@pytest.mark.parametrize("bad", [[math.nan] * 9, [INF] + [0.0] * 8, [-INF] * 9, [0.0] * 8 + [math.nan]])
def test_a_bad_row_fails_alone(sampler: Greedy | Nucleus, bad: list[float]) -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    controls = controls_of(sampler, 5, 9)
    spoiled = logits.clone()
    spoiled[2] = torch.tensor(bad)
    others = [0, 1, 3, 4]
    assert torch.equal(sampler.filter(spoiled, controls)[others], sampler.filter(logits, controls)[others])
    drawn = sampler.sample(spoiled, controls)
    assert torch.equal(drawn[others], sampler.sample(logits, controls)[others])
    assert int(drawn[2]) == -1
    assert int(controls.draw(sampler.filter(spoiled, controls))[2]) == -1


@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 1.0}, {"temperature": 2.0}, {"top_p": 0.5, "temperature": 0.5}, {"top_k": 3, "top_p": 0.95}],
    ids=str,
)
def test_draws_are_as_frequent_as_they_should_be(params: dict[str, float]) -> None:
    logits = [0.0, 1.0, 0.5, -1.0, 0.5, -3.0, 2.0, -0.25]
    expected = torch.tensor(nucleus(logits, **params))
    rows = 20_000
    controls = controls_of(Nucleus(), 1, 8, **params)
    position = torch.arange(rows)[:, None]  # one text's positions, drawn together
    controls = replace(controls, position=position)
    drawn = Nucleus().sample(torch.tensor([logits]).expand(rows, -1), controls)
    counts = torch.bincount(drawn, minlength=8)
    assert int(counts[expected == 0].sum()) == 0
    assert chi_squared(counts[expected > 0], expected[expected > 0] * rows) > 1e-3


def test_a_draw_depends_on_its_row_alone() -> None:
    """Not on the batch, the place in it, or what the others asked for."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(24, 300, generator=draw) * 3
    controls = controls_of(Nucleus(), 24, 300)
    controls.values["temperature"].uniform_(0.0, 2.0, generator=draw)
    controls.values["top_p"].uniform_(0.0, 1.0, generator=draw)
    controls.values["top_k"].random_(0, 50, generator=draw)
    controls.seed.random_(generator=draw)
    drawn = Nucleus().sample(logits, controls)
    assert len(set(drawn.tolist())) > 8
    for shuffle in (torch.randperm(24, generator=draw), torch.arange(23, -1, -1), *torch.arange(24)[:, None]):
        values = {name: t[shuffle] for name, t in controls.values.items()}
        other = type(controls)(values, controls.seed[shuffle], controls.position[shuffle], {}, controls.ids, [])
        assert torch.equal(Nucleus().sample(logits[shuffle], other), drawn[shuffle])

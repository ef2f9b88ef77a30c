"""Every built-in sampler against its definition in float64, its draws, hard rows, chains and the compiler."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import chi_squared, controls_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_samplers import PLAIN, softmax
from rwkv_samplers.selection import LAST, cut_by_digits, cut_by_sorting, mass, order, prefix, score_of
from torch import Tensor

from rwkv_runtime.plugins import Plugins
from rwkv_runtime.sampler import Chain, Sampler
from rwkv_runtime.testing import check_sampler, distribution

INF = math.inf
BUILT_IN = Plugins.load({"RWKV_PLUGINS": ""})
OTHERS = {"structured"}  # has tests of its own
SAMPLERS = {s.name: s for s in BUILT_IN.samplers if s.name not in OTHERS}
CHAINS = [
    "penalties,min-p,temperature",
    "dry,top-k,mirostat",
    "logit-bias,banned,xtc,standard",
    "rwkv-alpha,typical,eta,top-n-sigma",
    "temperature,epsilon,top-p,greedy",
]
WAYS = (cut_by_digits, cut_by_sorting)
grid = st.lists(st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.just(-INF)), min_size=1, max_size=40).filter(
    lambda z: max(z) > -INF
)
wild = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, INF, -INF, math.nan, 3e38, -3e38, 1e-40, 88.0]), st.floats(-30, 30, width=32)
)


def choices(sampler: Sampler) -> st.SearchStrategy[dict[str, float | str]]:
    """Parameters: defaults, neutral values, bounds, tiny and middling ones."""
    each: dict[str, st.SearchStrategy[float | str]] = {}
    for name, param in sampler.params.items():
        if isinstance(param.default, str):
            each[name] = st.just(param.default)
            continue
        wanted = [param.default, param.off, param.low, param.high, 0, 1, 2, 5]
        if isinstance(param.default, float):
            wanted += [1e-7, 0.01, 0.3141, 0.777, 0.9999999, 1.3]
        fit = [v for v in wanted if isinstance(v, (int, float)) and param.low <= v <= param.high]
        each[name] = st.sampled_from(sorted(set(fit)))
    return st.fixed_dictionaries(each)


def nudged(values: dict[str, float | str], by: float) -> dict[str, float | str]:
    """The same with every share moved a little: where a token stands at the edge, rounding decides."""
    return {k: v * (1 + by) if isinstance(v, float) and v not in (0.0, 1.0, -1.0) else v for k, v in values.items()}


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_sampler_is_its_definition(name: str, data: st.DataObject) -> None:
    sampler = SAMPLERS[name]
    logits = data.draw(grid)
    values = data.draw(choices(sampler))
    if "xtc_probability" in values:
        values["xtc_probability"] = data.draw(st.sampled_from([0.0, 1.0]))
    ours = distribution(sampler, torch.tensor(logits), **values)[0]  # type: ignore[arg-type]
    off = []
    for by in (0.0, 1e-6, -1e-6):
        theirs = torch.tensor(softmax(PLAIN[name](logits, **nudged(values, by))))
        off.append(float((ours - theirs).abs().sum()))
    assert min(off) < 1e-3


def test_every_sampler_is_covered() -> None:
    with_memory = {"penalties", "rwkv-alpha", "dry", "logit-bias", "banned"}  # tests/test_samplers_memory.py
    assert set(SAMPLERS) == set(PLAIN) | with_memory


@pytest.mark.parametrize("name", [*SAMPLERS, *CHAINS])
def test_it_keeps_the_rules(name: str) -> None:
    sampler = BUILT_IN.sampler(name)
    check_sampler(sampler)
    assert sampler.runs == "graph"
    assert all(stage.summary for stage in sampler.stages)
    assert all(param.help for param in sampler.params.values())


def test_all_of_them_can_be_chained() -> None:
    """No two have a parameter or a slot of the same name, but those that hold others."""
    chain = Chain([s for name, s in SAMPLERS.items() if name not in ("nucleus", "standard")])
    assert {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition", "mirostat_tau"} <= set(chain.params)
    assert len(chain.slots(10)) >= 9
    check_sampler(chain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_neutral_values_change_nothing(name: str) -> None:
    sampler = SAMPLERS[name]
    off = {key: param.off for key, param in sampler.params.items() if param.off is not None}
    if not off:
        return
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, 7:] = -INF
    kept = distribution(sampler, logits, **off)  # type: ignore[arg-type]
    torch.testing.assert_close(kept, torch.softmax(logits.double(), dim=-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_logits_give_a_token_that_may_be_drawn_or_a_failed_row(name: str, data: st.DataObject) -> None:
    sampler = SAMPLERS[name]
    rows = data.draw(st.lists(st.lists(wild, min_size=6, max_size=6), min_size=1, max_size=4))
    settings_ = [data.draw(choices(sampler)) for _ in rows]
    params = {key: [values[key] for values in settings_] for key in sampler.params}
    logits = torch.tensor(rows)
    controls = controls_of(sampler, len(rows), 6, **params)
    for _ in range(2):
        drawn = sampler.sample(logits, controls)
        for row, token in zip(logits, drawn.tolist(), strict=True):
            if bool(row.isnan().any()) or not math.isfinite(float(row.max())):
                assert token == -1
            else:
                assert 0 <= token < 6
                assert float(row[token]) > -INF
        sampler.update(drawn, logits, controls)


@pytest.mark.parametrize("name", [*SAMPLERS, *CHAINS])
@pytest.mark.parametrize("bad", [[math.nan] * 9, [INF] + [0.0] * 8, [-INF] * 9, [0.0] * 8 + [math.nan]])
def test_a_bad_row_fails_alone(name: str, bad: list[float]) -> None:
    sampler = BUILT_IN.sampler(name)
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) * 2
    controls, twin = controls_of(sampler, 5, 9), controls_of(sampler, 5, 9)
    spoiled = logits.clone()
    spoiled[2] = torch.tensor(bad)
    others = [0, 1, 3, 4]
    for _ in range(3):
        kept = sampler.filter(spoiled, controls)
        assert torch.equal(kept[others], sampler.filter(logits, twin)[others])
        drawn, expected = sampler.sample(spoiled, controls), sampler.sample(logits, twin)
        assert torch.equal(drawn[others], expected[others])
        assert int(drawn[2]) == int(controls.draw(kept)[2]) == -1
        sampler.update(drawn, spoiled, controls)
        sampler.update(expected, logits, twin)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "greedy"])
def test_draws_are_as_frequent_as_they_should_be(name: str) -> None:
    sampler, rows = SAMPLERS[name], 20_000
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.5, -3.0, 2.0, -0.25])
    values = {"top_k": 5, "xtc_probability": 1.0, "min_p": 0.1, "epsilon": 0.05, "temperature": 1.5}
    values = {key: value for key, value in values.items() if key in sampler.params}
    expected = distribution(sampler, logits, **values)[0]
    controls = replace(controls_of(sampler, 1, 8, **values), position=torch.arange(rows)[:, None])
    controls = replace(controls, seed=controls.seed.expand(rows, 1), notes=list(controls.notes) * rows)
    drawn = sampler.sample(logits.expand(rows, -1), controls)
    counts = torch.bincount(drawn, minlength=8)
    assert int(counts[expected == 0].sum()) == 0
    assert chi_squared(counts[expected > 0], expected[expected > 0] * rows) > 1e-3


def test_xtc_leaves_tokens_out_as_often_as_asked() -> None:
    logits, rows = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), 20_000
    controls = replace(controls_of(SAMPLERS["xtc"], 1, 4), position=torch.arange(rows)[:, None])
    controls.values["xtc_probability"].fill_(0.3)
    controls.values["xtc_threshold"].fill_(0.15)
    kept = SAMPLERS["xtc"].filter(logits.expand(rows, -1), replace(controls, seed=controls.seed.expand(rows, 1)))
    without = int((kept[:, 0] == -INF).sum())
    assert kept[:, 2:].isfinite().all()
    assert chi_squared(torch.tensor([without, rows - without]), torch.tensor([0.3, 0.7]) * rows) > 1e-3


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(wild, min_size=7, max_size=7), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 30))
def test_the_fast_selection_is_the_plain_one(rows: list[list[float]], count: int, heavy: int) -> None:
    score = torch.tensor(rows).nan_to_num(0.0)  # infinities too
    weights = [torch.ones_like(score).long(), torch.arange(7).expand_as(score) % 4]
    for weight, target in zip(weights, (count, heavy), strict=True):
        fast, plain = (way(order(score), weight, partial(torch.gt, torch.as_tensor(target))) for way in WAYS)
        assert torch.equal(fast.key, plain.key)
        reached = fast.key[:, 0] != LAST
        for ours, theirs in zip(fast[2:], plain[2:], strict=True):
            assert torch.equal(ours[reached], theirs[reached])
    assert torch.equal(score_of(order(score)), score)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 1e4])
def test_the_selections_agree_on_a_large_vocabulary(scale: float) -> None:
    score = torch.randn(3, 65536, generator=torch.Generator().manual_seed(2)) * scale
    score[1] = score[1].round()
    score[2, 100:] = -INF
    weight = mass(score)
    for share in (1e-9, 0.5, 0.999):
        target = (weight.sum(dim=-1, keepdim=True) * share).long().clamp(min=1)
        fast, plain = (way(order(score), weight, partial(torch.gt, torch.as_tensor(target))) for way in WAYS)
        assert all(map(torch.equal, fast, plain))
    for k in (1, 50, 65535, 65536, 65537):
        kept = prefix(score, torch.ones_like(weight), torch.full((3, 1), k))
        expected = torch.zeros_like(kept).scatter(
            -1, score.sort(dim=-1, descending=True, stable=True).indices[:, :k], True
        )
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("name", ["nucleus", "standard", "dry,penalties,mirostat,xtc"])
def test_the_compiler_takes_it_whole(name: str) -> None:
    """As one graph, with the same result; the large-vocabulary way is in it."""
    sampler = BUILT_IN.sampler(name)
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)) * 3
    controls, twin = controls_of(sampler, 2, 5000), controls_of(sampler, 2, 5000)

    def step() -> Tensor:
        token = sampler.sample(logits, controls)
        sampler.update(token, logits, controls)
        return token

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        token = sampler.sample(logits, twin)
        sampler.update(token, logits, twin)
        assert torch.equal(compiled(), token)

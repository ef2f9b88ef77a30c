"""States that are written every few steps say at each what those that are written at every step do."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from drawn import TUNING, Draw
from engines import finish
from helpers import CPU, apart, tokens_of
from rwkv_backends import fused
from rwkv_backends.deferred import DeferredState
from rwkv_backends.fused import FAMILIES, Fused
from rwkv_backends.kernels import deferred6
from rwkv_backends.kernels.tuning import Tuning
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

from rwkv_runtime import Model, Plugins, State
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import StateError
from rwkv_runtime.generation import Request
from rwkv_runtime.testing import check_backend
from rwkv_runtime.tokenizer import Tokenizer

ROOM, ROWS, V = 2, 5, 37
FEW = replace(TUNING, vector_rows=64)
SKINNY = replace(TUNING, vector_rows=0, skinny_rows=64)
MANY = replace(TUNING, vector_rows=0, skinny_rows=0)


def model_of(plugins: Plugins, dtype: torch.dtype = torch.float32, state: torch.dtype = torch.float32) -> Model:
    architecture = plugins.architectures.get("rwkv6")
    config = replace(architecture.sizes(2, 48, V, 16), ranks={"maa": 5, "decay": 9})
    return build_model(architecture.random(config, dtype=dtype), [architecture], CPU, state_dtype=state)


def step(model: Model, tuning: Tuning, states: list[State], place: int, rows: int) -> list[Tensor]:
    """The same token of each of the first rows, through each state."""
    forward = import_module(FAMILIES["rwkv6"]).forward(model, tuning)
    tokens = torch.tensor([[token % V] for token in tokens_of(rows, place)])
    return [forward(tokens, state.view(0, rows)) for state in states]


def settled(state: State) -> list[Tensor]:
    return [torch.cat([state.settled(row)[name] for row in range(state.rows)], 1) for name in ("att_kv", "att_x_prev")]


@pytest.mark.parametrize("rank", [9, 20])
def test_decays(dtype: torch.dtype, rank: int) -> None:
    draw = Draw(dtype)
    low, w, base = draw(ROWS, rank), draw(70, rank), draw(70, dtype=torch.float32)
    out = deferred6.decays(low, w, base, torch.empty(ROWS, 70), TUNING)
    raw = base.double() + torch.tanh(low.double()) @ w.double().t()
    assert apart(out, -torch.exp(raw)) < 1e-5


@pytest.mark.parametrize(
    ("tuning", "dtype", "state", "far", "rows"),
    [
        (FEW, torch.float32, torch.float32, 1e-5, 2),
        (MANY, torch.float32, torch.float32, 1e-5, ROWS),
        (MANY, torch.float32, torch.float16, 1e-2, ROWS),
        (SKINNY, torch.float16, torch.float32, 2e-2, ROWS),
    ],
    ids=["few", "many", "state in 16 bits", "skinny"],
)
def test_each_step_says_what_one_that_writes_says(
    plugins: Plugins, tuning: Tuning, dtype: torch.dtype, state: torch.dtype, far: float, rows: int
) -> None:
    """One row begins later, and has room while the others are written."""
    model = model_of(plugins, dtype, state)
    plain, ours = model.new_state(rows), DeferredState.of(model, rows, ROOM)
    for place in range(ROOM + 3):
        if place == 1:
            for one in (plain, ours):
                one.clear(1)
        expected, logits = step(model, tuning, [plain, ours], place, rows)
        assert apart(logits, expected) < far
        for mine, theirs in zip(settled(ours), settled(plain), strict=True):
            assert apart(mine.float(), theirs.float()) < far
    assert ours["deferred_filled"][0].tolist() == [1, 2, *[1] * (rows - 2)]


def test_they_keep_the_contract_of_a_backend(plugins: Plugins) -> None:
    backend = Fused(replace(MANY, deferred=2, deferred_rows=0))
    check_backend(backend, [plugins.architectures.get("rwkv6")], n_layer=1, n_embd=32)


@pytest.mark.parametrize(
    ("free", "expected"), [(1.0, State), (1.9, State), (9.0, DeferredState)], ids=["once", "not twice", "enough"]
)
def test_without_the_memory_for_it_a_state_is_written_at_each_step(
    plugins: Plugins,
    free: float,
    expected: type[State],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Free is so many times what it takes: a captured step has it twice."""
    model = model_of(plugins)
    monkeypatch.setattr(fused, "free_bytes", lambda device: int(free * DeferredState.of(model, ROWS, 8).nbytes))
    state = Fused(replace(MANY, deferred_rows=ROWS - 1)).new_state(model, ROWS)
    assert type(state) is expected
    assert bool(caplog.messages) == (expected is State)


def test_what_has_no_room_after_all_is_written_at_each_step(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: object) -> DeferredState:
        raise torch.OutOfMemoryError("no room")

    backend, model = Fused(replace(MANY, deferred_rows=1)), model_of(plugins)
    monkeypatch.setattr(Fused, "_room", lambda *_: True)
    monkeypatch.setattr(DeferredState, "of", no_room)
    assert type(backend.new_state(model, ROWS)) is State
    assert caplog.messages == [f"no memory is left for what makes steps of {ROWS} rows faster"]


def test_few_rows_are_written_at_each_step(plugins: Plugins) -> None:
    backend = Fused(replace(MANY, deferred_rows=ROWS))
    assert type(backend.new_state(model_of(plugins), ROWS)) is State
    assert type(backend.new_state(model_of(plugins), ROWS + 1)) is DeferredState


@pytest.mark.parametrize("state", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_of_a_model_in_bfloat16_a_state_in_full_is_read_rounded(
    plugins: Plugins, dtype: torch.dtype, state: torch.dtype
) -> None:
    ours = DeferredState.of(model_of(plugins, dtype, state), 2, ROOM)
    if (dtype, state) == (torch.bfloat16, torch.float32):
        assert ours.layer(1).rounded.dtype == torch.bfloat16
    else:
        assert ours.layer(1).rounded.data_ptr() == ours["att_kv"][1].data_ptr()


@pytest.mark.parametrize("tuning", [SKINNY, MANY], ids=["skinny", "many"])
def test_rows_are_rounded_whenever_they_are_written(plugins: Plugins, tuning: Tuning) -> None:
    """Rows that come with a state, then read a prompt; to float16 here, which the interpreter multiplies."""
    model = model_of(plugins, torch.float16)
    plain, ours = model.new_state(ROWS), DeferredState.of(model, ROWS, ROOM)
    ours.tensors["deferred_rounded"] = torch.zeros_like(ours["att_kv"], dtype=torch.float16)
    fresh = model.new_state(ROWS)
    fresh["att_kv"].normal_(generator=torch.Generator().manual_seed(3))
    forward = import_module(FAMILIES["rwkv6"]).forward(model, tuning)
    prompt = torch.tensor([tokens_of(18, row) for row in range(ROWS)]) % V

    def compare(logits: list[Tensor]) -> None:
        assert apart(logits[1], logits[0]) < 5e-3
        for mine, theirs in zip(settled(ours), settled(plain), strict=True):
            assert apart(mine.float(), theirs.float()) < 5e-3

    for row in range(ROWS):
        for one in (plain, ours):
            one.copy(fresh, row, row)
    for place in range(ROOM + 2):
        compare(step(model, tuning, [plain, ours], place, ROWS))
    compare([forward(prompt, state) for state in (plain, ours)])
    for place in range(ROOM + 2):
        compare(step(model, tuning, [plain, ours], place, ROWS))


def test_a_state_is_written_when_there_is_no_room_and_only_then(plugins: Plugins) -> None:
    model = model_of(plugins)
    state = DeferredState.of(model, ROWS, ROOM)
    written = []
    for place in range(2 * ROOM + 1):
        before = state["att_kv"].clone()
        step(model, MANY, [state], place, ROWS)
        written.append(not torch.equal(before, state["att_kv"]))
    assert written == [False] * ROOM + [True] + [False] * (ROOM - 1) + [True]


def test_rows_that_are_not_in_the_view_are_left_alone(plugins: Plugins) -> None:
    model = model_of(plugins)
    state = DeferredState.of(model, ROWS, ROOM)
    before = state.clone()
    for place in range(ROOM + 2):
        step(model, MANY, [state], place, ROWS - 2)
    assert all(torch.equal(t[:, -2:], before[name][:, -2:]) for name, t in state.tensors.items())


def test_a_prompt_finds_all_updates_made(plugins: Plugins) -> None:
    model = model_of(plugins)
    plain, ours = model.new_state(2), DeferredState.of(model, 2, ROOM)
    step(model, MANY, [plain, ours], 0, 2)
    forward = import_module(FAMILIES["rwkv6"]).forward(model, MANY)
    prompt = torch.tensor([tokens_of(20, row) for row in range(2)]) % V
    assert apart(forward(prompt, ours), forward(prompt, plain)) < 1e-5
    for mine, theirs in zip(settled(ours), settled(plain), strict=True):
        assert apart(mine, theirs) < 1e-5


def test_rows_come_from_plain_states_and_go_to_them(plugins: Plugins) -> None:
    model = model_of(plugins)
    plain, ours = model.new_state(ROWS), DeferredState.of(model, ROWS, ROOM)
    for place in range(2):
        step(model, MANY, [plain, ours], place, ROWS)
    fresh = model.new_state(1)
    fresh["att_kv"].fill_(0.5)
    for one in (plain, ours):
        one.copy(fresh, 0, 2)  # what waited for it is gone
        one.copy(one, 4, 1)  # with what waits for it
    for mine, theirs in zip(settled(ours), settled(plain), strict=True):
        assert apart(mine, theirs) < 1e-5
    with pytest.raises(StateError, match="deferred_filled"):
        plain.copy(ours, 0, 0)  # as written, it would be wrong
    plain.copy(ours.settled(0), 0, 0)


def test_what_is_not_finite_stays_so(plugins: Plugins) -> None:
    model = model_of(plugins)
    state = DeferredState.of(model, 2, ROOM)
    state["att_kv"][:, 1] = torch.nan
    for place in range(2):
        [logits] = step(model, MANY, [state], place, 2)
    assert bool(logits[0].isfinite().all())
    assert not bool(logits[1].isfinite().any())
    assert bool(state.settled(1)["att_kv"].isnan().all())


REQUESTS = [Request(tokens_of(n + 1, n), {"temperature": 0.9}, max_tokens=2 + 2 * n, seed=n) for n in range(5)]


def engine_of(plugins: Plugins, tokenizer: Tokenizer, deferred: int) -> Engine:
    architecture = plugins.architectures.get("rwkv6")
    model = build_model(architecture.random(architecture.sizes(1, 32, 260, 16)), [architecture], CPU)
    tuning = replace(TUNING, vector_rows=0, skinny_rows=1, deferred=deferred, deferred_rows=1)
    return Engine(model, Fused(tuning), Nucleus(), tokenizer, 3)


def test_texts_come_and_go_and_are_the_same(plugins: Plugins, tokenizer: Tokenizer) -> None:
    ours, plain = engine_of(plugins, tokenizer, ROOM), engine_of(plugins, tokenizer, 0)
    assert isinstance(ours.state, DeferredState)
    assert not isinstance(plain.state, DeferredState)
    texts = [[generation.tokens for generation in finish(engine, *REQUESTS)] for engine in (ours, plain)]
    assert texts[0] == texts[1]


def test_what_is_kept_beside_a_step_is_of_its_kind(
    plugins: Plugins, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory there is by then."""
    engine = engine_of(plugins, tokenizer, ROOM)
    engine.lag = 1
    monkeypatch.setattr(fused, "free_bytes", lambda device: 0)
    finish(engine, replace(REQUESTS[1], keep=True, max_tokens=4))
    assert type(engine._before) is DeferredState


@pytest.mark.parametrize("lag", [0, 1])
def test_where_a_text_stood_is_kept_with_all_it_has_read(plugins: Plugins, tokenizer: Tokenizer, lag: int) -> None:
    ours, plain = engine_of(plugins, tokenizer, ROOM), engine_of(plugins, tokenizer, 0)
    kept = [replace(request, keep=True) for request in REQUESTS]
    snapshots = []
    for engine in (ours, plain):
        engine.lag = lag
        snapshots.append([generation.snapshot for generation in finish(engine, *kept)])
    for mine, theirs in zip(*snapshots, strict=True):
        assert mine is not None
        assert theirs is not None
        assert type(mine.state) is State
        assert all(apart(mine.state[name], theirs.state[name]) < 1e-5 for name in theirs.state.tensors)
    on = [Request(start=one[3], params={"temperature": 0.9}, max_tokens=5, seed=1) for one in snapshots]
    assert finish(ours, on[0])[0].tokens == finish(plain, on[1])[0].tokens

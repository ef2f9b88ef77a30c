"""The native backend: the model's own arithmetic to rounding, for every row, thread count, dtype and head size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engines import finish
from helpers import CPU, Tensors, built, off, tiny_config, tokens_of
from rwkv_backends import native
from rwkv_backends.eager import Eager
from rwkv_backends.native import ROWS, Native
from rwkv_backends.native.structs import DTYPES, Matrix, Packer
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

import rwkv_runtime
from rwkv_runtime.backend import Forward
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.state import State
from rwkv_runtime.testing import check_backend
from rwkv_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(Native().why_not(None) is not None, reason=str(Native().why_not(None)))
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Of the norm of all logits, against float64 on the same rounded weights."""


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decoded(forward: Forward, state: State, tokens: Tensor) -> Tensor:
    """Logits after each token of tokens [B, T], read one by one: [B, T, V]."""
    return torch.stack([forward(column, state) for column in tokens.split(1, dim=1)], dim=1)


def texts(rows: int, length: int = 12) -> Tensor:
    return torch.tensor([tokens_of(length, seed) for seed in range(rows)])


@pytest.mark.parametrize(
    ("n_embd", "head_size"), [(64, 16), (80, 20), (72, 36), (96, 48), (128, 64), (96, 96), (128, 128)]
)
def test_it_passes_for_a_backend(architecture: Architecture, n_embd: int, head_size: int) -> None:
    check_backend(Native(), [architecture], n_embd=n_embd, head_size=head_size, tolerance=1e-5)


def test_logits_are_close_to_the_reference(architecture: Architecture, plugins: Plugins, dtype: torch.dtype) -> None:
    """In 16 bits closer than plain PyTorch, which rounds between all operations."""
    tensors = {n: t.to(dtype) for n, t in architecture.random(tiny_config(architecture, layers=4)).items()}
    model, tokens = built(tensors, plugins), tokens_of(20)
    expected = architecture.reference(tensors, tokens)
    ours = decoded(Native().forward(model), model.new_state(), torch.tensor([tokens]))[0]
    eager = decoded(Eager().forward(model), model.new_state(), torch.tensor([tokens]))[0]
    assert off(ours, expected) < TOLERANCE[dtype]
    if dtype != torch.float32:
        assert off(ours, expected) < off(eager, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_are_read_as_they_are(
    checkpoint: Tensors, plugins: Plugins, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain PyTorch's logits with the same 8 bits; nothing but them goes to the C, no copy of them widened or not."""
    model = build_model(checkpoint, plugins.architectures, CPU, dtype, quant="int8")
    given: list[tuple[Tensor, int]] = []
    matrix = Packer.matrix

    def watched(packer: Packer, weight: Tensor, scale: Tensor | None = None) -> Matrix:
        packed = matrix(packer, weight, scale)
        if scale is not None:
            assert packed.dtype == DTYPES[torch.int8]
            given.append((weight, packed.weight))
        return packed

    monkeypatch.setattr(Packer, "matrix", watched)
    forward, tokens = Native().forward(model), texts(3)
    assert len(given) >= 6 * model.config.n_layer + 1
    assert all(weight.dtype == torch.int8 and weight.data_ptr() == address for weight, address in given)
    ours = decoded(forward, model.new_state(3), tokens)
    theirs = decoded(Eager().forward(model), model.new_state(3), tokens)
    assert off(ours, theirs) < TOLERANCE[dtype]


def test_the_state_is_that_of_plain_pytorch(model: Model) -> None:
    """So that prompts and steps can follow each other."""
    tokens = texts(3)
    ours, theirs = model.new_state(3), model.new_state(3)
    decoded(Native().forward(model), ours, tokens)
    Eager().forward(model)(tokens, theirs)
    for name, t in theirs.tensors.items():
        assert off(ours[name], t) < 1e-5


def test_a_row_has_the_same_logits_alone_and_in_any_batch(
    checkpoint: Tensors, plugins: Plugins, dtype: torch.dtype
) -> None:
    """To the bit: so the same text is written. Above ROWS rows torch multiplies, as for prompts."""
    model = built(checkpoint, plugins, dtype)
    forward, tokens = Native().forward(model), texts(ROWS + 1, 4)
    alone = [decoded(forward, model.new_state(), tokens[row : row + 1])[0] for row in range(ROWS + 1)]
    for rows in range(1, ROWS + 1):
        assert torch.equal(decoded(forward, model.new_state(rows), tokens[:rows]), torch.stack(alone[:rows]))
    many = decoded(forward, model.new_state(ROWS + 1), tokens)
    assert torch.equal(many, decoded(Eager().forward(model), model.new_state(ROWS + 1), tokens))


def test_the_number_of_threads_changes_no_bit(
    checkpoint: Tensors, plugins: Plugins, dtype: torch.dtype, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "WEIGHTS", 1)  # one thread would do for a model so small
    model = built(checkpoint, plugins, dtype)
    forward, tokens = Native().forward(model), texts(3)
    assert forward.most_threads > 3
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        state = model.new_state(3)
        results.append((decoded(forward, state, tokens), state))
    for logits, state in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert all(torch.equal(t, results[0][1][name]) for name, t in state.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_of_rows_leaves_the_others_alone(checkpoint: Tensors, plugins: Plugins, dtype: torch.dtype) -> None:
    model = built(checkpoint, plugins, dtype)
    forward, tokens = Native().forward(model), texts(2)
    state = model.new_state(6)
    for t in state.tensors.values():
        t.fill_(0.25)
    part = state.view(2, 4)
    for row in (0, 1):
        part.clear(row)
    logits = decoded(forward, part, tokens)
    assert torch.equal(logits, decoded(forward, model.new_state(2), tokens))
    for t in state.tensors.values():
        assert (t[:, [0, 1, 4, 5]] == 0.25).all()


def test_a_state_whose_channels_lie_apart_is_taken_too(model: Model) -> None:
    tokens, state, expected = texts(2), model.new_state(2), model.new_state(2)
    for name, t in state.tensors.items():
        state.tensors[name] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    logits = decoded(Native().forward(model), state, tokens)
    assert off(logits, decoded(Eager().forward(model), expected, tokens)) < 1e-5
    assert all(off(state[name], t) < 1e-5 for name, t in expected.tensors.items())


@pytest.mark.parametrize("decay", [-30.0, 2.0, 8.0, 80.0])
def test_decays_from_none_to_all(
    checkpoint: Tensors, architecture: Architecture, plugins: Plugins, decay: float
) -> None:
    tensors = dict(checkpoint)
    for name, t in tensors.items():
        if name.endswith(("time_decay", "att.w0")):
            tensors[name] = torch.full_like(t, decay)
    model, tokens = built(tensors, plugins), tokens_of(200)
    ours = decoded(Native().forward(model), model.new_state(), torch.tensor([tokens]))[0]
    assert off(ours, architecture.reference(tensors, tokens)) < 1e-5


def test_every_position_is_the_last_one(model: Model) -> None:
    forward, tokens = Native().forward(model), texts(2, 1)
    every = forward(tokens, model.new_state(2), every=True)
    assert torch.equal(every[:, 0], forward(tokens, model.new_state(2)))


def test_tokens_that_lie_apart(model: Model) -> None:
    forward, tokens = Native().forward(model), texts(3, 8)
    logits = forward(tokens[:, 4:5], model.new_state(3))
    assert torch.equal(logits, forward(tokens[:, 4:5].clone(), model.new_state(3)))


@pytest.mark.parametrize("token", [-1, 260, 1 << 40])
def test_a_token_that_is_not_in_the_vocabulary_is_an_error(model: Model, token: int) -> None:
    state = model.new_state(2)
    with pytest.raises(IndexError, match="token ids are from 0 to 259"):
        Native().forward(model)(torch.tensor([[3], [token]]), state)
    assert all((t == 0).all() for t in state.tensors.values())


def test_a_value_that_is_not_a_number_is_shown(model: Model) -> None:
    state = model.new_state(2)
    state["att_kv"][0, 1] = torch.nan
    logits = Native().forward(model)(texts(2, 1), state)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_what_it_is_not_for_is_said(model: Model) -> None:
    class Other(type(model.architecture)):  # type: ignore[misc]
        name = "rwkv5"

    assert Native().why_not(model) is None
    for change, reason in (
        ({"device": torch.device("meta")}, "it runs on the CPU, the model is on meta"),
        ({"dtype": torch.float64}, "it does not know weights of torch.float64"),
        ({"architecture": Other()}, "it knows rwkv6 and rwkv7, the model is rwkv5"),
    ):
        assert Native().why_not(replace(model, **change)) == reason


def test_the_engine_writes_with_it_what_it_writes_with_plain_pytorch() -> None:
    """The story model in float32: the same fifty tokens where the likeliest is taken, and text where they are drawn."""
    story = rwkv_runtime.load(backend="native", dtype="float32")
    assert story.backend.name == "native"
    greedy = {"sampler": "greedy", "max_tokens": 50}
    ours = "".join(story.generate("Once upon a time", **greedy))
    theirs = "".join(rwkv_runtime.load(backend="eager", dtype="float32").generate("Once upon a time", **greedy))
    assert ours == theirs
    assert len("".join(story.generate("Once upon a time", max_tokens=50, seed=1)).split()) > 20


def test_texts_side_by_side_are_what_they_are_alone(model: Model, tokenizer: Tokenizer) -> None:
    requests = [Request(tokens_of(9, seed), {"temperature": 1.0}, max_tokens=12 + seed, seed=seed) for seed in range(5)]
    alone = [finish(Engine(model, Native(), Nucleus(), tokenizer), request)[0].tokens for request in requests]
    together = finish(Engine(model, Native(), Nucleus(), tokenizer, rows=3), *requests)
    assert [generation.tokens for generation in together] == alone

"""The fused backend on a GPU: compiled kernels in captured graphs say what plain PyTorch says."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import pytest
import torch
from engines import finish
from gpu_models import DTYPES, assert_no_further, in_16_bits, needs_gpu, on_gpu, pair
from helpers import PRESENT, VOCAB_SIZE, apart, tokens_of
from rwkv_backends.deferred import DeferredState
from rwkv_backends.eager import Eager
from rwkv_backends.fused import FAMILIES, Fused
from rwkv_backends.kernels import rwkv6, rwkv7
from rwkv_backends.kernels.beside import Beside
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.prompts import CapturedPrompts
from rwkv_samplers.nucleus import Nucleus
from settling import check_settled
from torch import Tensor

from rwkv_runtime.blank import blank_model
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import usable
from rwkv_runtime.sampler import check_params
from rwkv_runtime.testing import check_backend
from rwkv_runtime.tokenizer import Tokenizer

pytestmark = needs_gpu
TOKENS = tokens_of(40)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def forced(engine: Engine, tokens: Sequence[int], rows: int) -> Tensor:
    """Logits [T, rows, V] of the ids that there are; each row reads the same tokens, one later than the row before."""
    for row in range(rows):
        engine.state.clear(row)
    steps = []
    for t in range(len(tokens)):
        for row in range(rows):
            engine.tokens[row] = tokens[(t + row) % len(tokens)]
        engine._ticks[rows]()
        steps.append(engine.logits[:rows, PRESENT].clone())
    return torch.stack(steps)


def test_it_can_be_used(plugins: Plugins, dtype: torch.dtype) -> None:
    for name in FAMILIES:
        assert usable(plugins, on_gpu(plugins, dtype, name))["fused"] is None


def test_it_keeps_the_contract_of_a_backend(plugins: Plugins) -> None:
    """Frozen as one graph; rows that are not in a view stay as they are."""
    check_backend(Fused(), [plugins.architectures.get(name) for name in FAMILIES], device="cuda")


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(pieces_from=1)], ids=["whole", "pieces"])
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_captured_steps_say_what_plain_pytorch_says(
    plugins: Plugins, tokenizer: Tokenizer, name: str, dtype: torch.dtype, rows: int, tuning: Tuning
) -> None:
    """With the sampler inside; the same at every run; seven layers, so that float16 halves the residual stream."""
    model, in_full = pair(plugins, dtype, name, layers=7)
    plain, exact = (forced(Engine(m, Eager(), Nucleus(), tokenizer, rows), TOKENS, rows) for m in (model, in_full))
    engine = Engine(model, Fused(tuning), Nucleus(), tokenizer, rows)
    first, second = (forced(engine, TOKENS, rows) for _ in range(2))
    assert bool(first.isfinite().all())
    assert_no_further(first, plain, exact)
    assert torch.equal(first, second)


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.usefixtures("poisoned")
def test_steps_that_seldom_write_a_state_say_what_plain_pytorch_says(
    plugins: Plugins, tokenizer: Tokenizer, dtype: torch.dtype, rows: int
) -> None:
    """A batch of nine, of which so many rows are at work: through the kernels of one, of few and of many."""
    model, in_full = pair(plugins, dtype, "rwkv6", layers=7)
    plain, exact = (forced(Engine(m, Eager(), Nucleus(), tokenizer, rows), TOKENS, rows) for m in (model, in_full))
    engine = Engine(model, Fused(Tuning(skinny_rows=4, deferred=3, deferred_rows=8)), Nucleus(), tokenizer, 9)
    assert isinstance(engine.state, DeferredState)
    first, second = (forced(engine, TOKENS, rows) for _ in range(2))
    assert_no_further(first, plain, exact)
    assert torch.equal(first, second)


@pytest.mark.parametrize("embd", [2048, 2560, 4096])
@pytest.mark.usefixtures("poisoned")
def test_kernels_that_overlap_say_what_they_say_one_by_one(plugins: Plugins, tokenizer: Tokenizer, embd: int) -> None:
    """Through many steps, in which one that did not wait would show."""
    architecture = plugins.architectures.get("rwkv6")
    tensors = architecture.random(architecture.sizes(3, embd, VOCAB_SIZE, 64), dtype=torch.bfloat16)
    model = build_model(tensors, [architecture], torch.device("cuda"))
    engines = [Engine(model, Fused(Tuning(overlap=on)), Nucleus(), tokenizer) for on in (False, True)]
    apart, overlapping = (forced(engine, tokens_of(300), 1) for engine in engines)
    assert bool(apart.isfinite().all())
    assert torch.equal(apart, overlapping)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_what_runs_beside_a_step_of_many_rows_changes_nothing(
    plugins: Plugins, tokenizer: Tokenizer, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through many steps, in which a kernel that did not wait for the other stream, or for its inputs, would show;
    then once without a graph."""
    architecture = plugins.architectures.get(name)
    tensors = architecture.random(architecture.sizes(3, 1024, VOCAB_SIZE, 64), dtype=torch.bfloat16)
    model = build_model(tensors, [architecture], torch.device("cuda"))
    beside = Engine(model, Fused(), Nucleus(), tokenizer, rows)
    with monkeypatch.context() as patch:
        for family in (rwkv6, rwkv7):
            patch.setattr(family, "Beside", lambda stream: Beside(None))
        alone = Engine(model, Fused(Tuning(overlap=False)), Nucleus(), tokenizer, rows)
    expected, said = (forced(engine, tokens_of(100), rows) for engine in (alone, beside))
    assert bool(expected.isfinite().all())
    assert torch.equal(expected, said)
    for engine in (alone, beside):
        with torch.inference_mode():
            engine._think(rows)()
    assert torch.equal(alone.logits, beside.logits)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_captured_steps_with_a_state_in_16_bits(
    plugins: Plugins, tokenizer: Tokenizer, name: str, dtype: torch.dtype, rows: int
) -> None:
    """As near to all in float32 as plain PyTorch with such a state is."""
    model, in_full = pair(plugins, dtype, name)
    model = in_16_bits(model)
    plain, exact = (forced(Engine(m, Eager(), Nucleus(), tokenizer, rows), TOKENS, rows) for m in (model, in_full))
    engine = Engine(model, Fused(), Nucleus(), tokenizer, rows)
    assert engine.state["att_kv"].dtype == torch.float16
    first, second = (forced(engine, TOKENS, rows) for _ in range(2))
    assert bool(first.isfinite().all())
    assert_no_further(first, plain, exact)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_it_is_near_the_reference(plugins: Plugins, name: str) -> None:
    architecture = plugins.architectures.get(name)
    tensors = architecture.random(architecture.sizes(3, 192, VOCAB_SIZE, 64))
    model = build_model(tensors, [architecture], torch.device("cuda"), torch.float32)
    tokens = torch.tensor([TOKENS], device="cuda")
    got = Fused().forward(model)(tokens, model.new_state(), every=True)[0]
    assert apart(got.cpu(), architecture.reference(tensors, TOKENS)) < 1e-4


def test_the_captured_step_draws_what_its_sampler_draws(plugins: Plugins, tokenizer: Tokenizer) -> None:
    engine = Engine(on_gpu(plugins, torch.bfloat16), Fused(), Nucleus(), tokenizer)
    forced(engine, TOKENS[:3], 1)
    params = check_params(Nucleus(), {"top_p": 0.95, "temperature": 1.5})
    engine.controls.set(0, params, 7, 0)
    for position in range(20):
        engine._ticks[1]()
        assert int(engine.controls.position) == position + 1
        controls = Controls.allocate(Nucleus(), 1, VOCAB_SIZE, torch.device("cuda"))
        controls.set(0, params, 7, position)
        assert torch.equal(engine.drawn, Nucleus().sample(engine.logits, controls))
        assert int(engine.tokens) == int(engine.drawn)


def test_every_draw_is_settled_as_it_must() -> None:
    check_settled(Fused(), "cuda")


def test_many_requests_come_and_go(plugins: Plugins, tokenizer: Tokenizer) -> None:
    """In float32 each writes what it writes alone with plain PyTorch, whichever rows and sizes it passes through."""
    model = on_gpu(plugins, torch.float32)
    requests = [Request(tokens_of(3 + 5 * i, i), {"temperature": 0}, max_tokens=4 + 3 * i) for i in range(7)]
    alone = [finish(Engine(model, Eager(), Nucleus(), tokenizer), request)[0].tokens for request in requests]
    together = finish(Engine(model, Fused(), Nucleus(), tokenizer, 4), *requests)
    assert [generation.tokens for generation in together] == alone


def test_what_warms_up_is_what_a_model_needs(plugins: Plugins) -> None:
    from rwkv_backends.kernels.settle import settle_kernel

    # Triton has variants for strides, that of the logits included, that are multiples of 16: all real vocabularies are.
    architecture = plugins.architectures.get("rwkv6")
    tensors = architecture.random(architecture.sizes(2, 320, 256, 64), dtype=torch.bfloat16)
    backend, model = Fused(), build_model(tensors, [architecture], torch.device("cuda"), torch.bfloat16)
    settle_kernel.device_caches.clear()
    device = torch.device("cuda", 0)
    blank = blank_model(tensors, architecture, model.config, device, torch.bfloat16, torch.float32)
    backend.warm_up(device, lambda: blank)
    warm = len(settle_kernel.device_caches[0][0])
    backend.forward(model)
    assert warm == len(settle_kernel.device_caches[0][0]) == 2


class Waits(Nucleus):
    """Looks at a number on the host, which no graph can hold."""

    name = "waits"

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        return super().sample(logits * float(logits.amax().isfinite()), controls)


def test_a_sampler_that_waits_runs_beside_the_graph(
    plugins: Plugins, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = on_gpu(plugins, torch.float32)
    with caplog.at_level(logging.WARNING, "rwkv_runtime"):
        engine = Engine(model, Fused(), Waits(), tokenizer)
    assert "sampler waits cannot be part of backend fused's graph" in caplog.text
    assert len(finish(engine, Request(TOKENS[:5], max_tokens=6))[0].tokens) == 6
    Engine(model, Fused(), Nucleus(), tokenizer)  # a graph can still be captured


def test_a_graph_can_be_captured_after_the_last_one_is_gone(
    plugins: Plugins, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """cuBLAS, which many rows need, may hold memory of a pool whose graphs are all gone."""
    model, backend = on_gpu(plugins, torch.bfloat16, "rwkv6"), Fused()
    engine = Engine(model, backend, Nucleus(), tokenizer, 8)
    del engine
    gc.collect()
    forward = backend.forward(model)
    assert isinstance(forward, CapturedPrompts)
    with caplog.at_level(logging.WARNING):
        forward(torch.tensor([tokens_of(min(forward.whole))], device="cuda"), model.new_state())
    assert forward._chunks, caplog.text

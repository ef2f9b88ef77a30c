"""Prompts through the fused backend on a GPU: in spans, filled up or whole, by graphs or without."""

from __future__ import annotations

import pytest
import torch
from gpu_models import DTYPES, assert_no_further, in_16_bits, needs_gpu, on_gpu, pair
from helpers import PRESENT, VOCAB_SIZE, tokens_of
from rwkv_backends.eager import Eager
from rwkv_backends.fused import FAMILIES, Fused
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.prompts import CapturedPrompts

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.plugins import Plugins

pytestmark = needs_gpu


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("T", [2, 16, 17, 100, 1000])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_prompts_say_what_plain_pytorch_says(plugins: Plugins, name: str, dtype: torch.dtype, B: int, T: int) -> None:
    model, in_full = pair(plugins, dtype, name)
    tokens = torch.tensor([tokens_of(T, seed) for seed in range(B)], device="cuda")
    states = [m.new_state(B) for m in (model, model, in_full)]
    passes = [Fused().forward(model), Eager().forward(model), Eager().forward(in_full)]
    assert_no_further(*(run(tokens, state, every=True) for run, state in zip(passes, states, strict=True)))
    for name in states[0].tensors:
        assert_no_further(*(state[name] for state in states))


@pytest.mark.parametrize("embd", [2048, 2560, 4096])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_kernels_of_a_prompt_say_the_same_one_by_one(plugins: Plugins, name: str, embd: int) -> None:
    architecture = plugins.architectures.get(name)
    tensors = architecture.random(architecture.sizes(3, embd, VOCAB_SIZE, 64), dtype=torch.bfloat16)
    model = build_model(tensors, [architecture], torch.device("cuda"))
    tokens = torch.tensor([tokens_of(1000, seed) for seed in range(2)], device="cuda")
    states, logits = [model.new_state(2), model.new_state(2)], []
    for on, state in zip((False, True), states, strict=True):
        forward = Fused(Tuning(overlap=on)).forward(model)
        logits.append(torch.cat([forward(piece, state) for piece in tokens.split([900, 100], dim=1)]))
    assert bool(logits[0].isfinite().all())
    assert torch.equal(*logits)
    assert all(torch.equal(states[0][part], states[1][part]) for part in states[0].tensors)


@pytest.mark.parametrize("T", [2, 100, 1000])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.usefixtures("poisoned")
def test_prompts_with_a_state_in_16_bits(plugins: Plugins, name: str, dtype: torch.dtype, T: int) -> None:
    """Then one token more, which reads what the prompt left."""
    model, in_full = pair(plugins, dtype, name)
    tokens = torch.tensor([tokens_of(T + 1, seed) for seed in range(3)], device="cuda")
    states = [in_16_bits(model).new_state(3), in_16_bits(model).new_state(3), in_full.new_state(3)]
    passes = [Fused().forward(in_16_bits(model)), Eager().forward(model), Eager().forward(in_full)]
    for part in tokens.split([T, 1], dim=1):
        assert_no_further(*(run(part, state, every=True) for run, state in zip(passes, states, strict=True)))
    for tensor in states[0].tensors:
        assert_no_further(*(state[tensor] for state in states))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_another_length_of_prompt_compiles_nothing(plugins: Plugins, name: str) -> None:
    from rwkv_backends.kernels import adapters7, batch, ffn, mixing, spans6, spans7, tokens, vector, wkv6, wkv7
    from triton.runtime.jit import JITFunction

    def count() -> int:
        modules = adapters7, batch, ffn, mixing, spans6, spans7, tokens, vector, wkv6, wkv7
        kernels = [k for module in modules for k in vars(module).values()]
        return sum(len(k.device_caches[0][0]) for k in kernels if isinstance(k, JITFunction))

    model = on_gpu(plugins, torch.bfloat16, name)
    forward = Fused().forward(model)
    before = count()
    for T in (2, 3, 15, 16, 31, 64, 100, 511, 512):
        forward(torch.tensor([tokens_of(T)], device="cuda"), model.new_state())
    assert count() == before


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_whole_chunk_is_one_graph_and_says_what_its_kernels_say(plugins: Plugins, name: str) -> None:
    model = on_gpu(plugins, torch.bfloat16, name)
    forward = Fused().forward(model)
    assert isinstance(forward, CapturedPrompts)
    sizes = [*forward.whole, *forward.whole, 3]
    tokens = torch.tensor([tokens_of(sum(sizes))], device="cuda")
    states = [model.new_state(), model.new_state()]
    for piece in tokens.split(sizes, dim=1):
        assert torch.equal(forward(piece, states[0]), forward.forward(piece, states[1]))
    assert sorted(forward._chunks) == sorted((length, False) for length in forward.whole)
    assert all(torch.equal(states[0][tensor], states[1][tensor]) for tensor in states[0].tensors)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_prompt_that_is_filled_up_says_the_same_before_and_after_its_size_is_captured(
    plugins: Plugins, name: str
) -> None:
    model, in_full = pair(plugins, torch.bfloat16, name)
    forward, exact = Fused(Tuning(padded=1 << 40)).forward(model), Eager().forward(in_full)
    assert isinstance(forward, CapturedPrompts)
    for captured, length in enumerate((2, 33, 600)):
        tokens = torch.tensor([tokens_of(length)], device="cuda")
        states = [model.new_state() for _ in range(4)]
        first, second, third = (forward(tokens, state) for state in states[:3])
        assert len(forward._chunks) == captured + 1
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert all(torch.equal(states[0][tensor], states[2][tensor]) for tensor in states[0].tensors)
        plain = forward.forward(tokens, states[3])
        assert_no_further(first[:, PRESENT], plain[:, PRESENT], exact(tokens, in_full.new_state())[:, PRESENT])

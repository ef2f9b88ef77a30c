"""What holds on a CPU holds on a GPU: backends, samplers, seeds, and a batch that does not fit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import rwkv_run
from helpers import controls_of

from rwkv_runtime.controls import Controls
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.model import Architecture
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import why_not
from rwkv_runtime.sampler import Sampler, check_params
from rwkv_runtime.testing import check_backend, distribution, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
BACKENDS = ("eager", "script", "compile")
V = 5000  # more than a block of any kernel


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A GPU of 1 GB."""
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1e9 / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def samplers(plugins: Plugins) -> list[Sampler]:
    """Those that draw on the device."""
    return [sampler for sampler in plugins.samplers if sampler.runs == "graph"]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_keeps_the_contract(plugins: Plugins, architecture: Architecture, name: str) -> None:
    backend = plugins.backends.get(name)
    if reason := why_not(backend, None):
        pytest.skip(f"{name}: {reason}")
    check_backend(backend, [architecture], device="cuda")


def test_every_sampler_keeps_the_same_tokens_with_the_same_probabilities(plugins: Plugins) -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)) * 3
    for sampler in samplers(plugins):
        there, here = distribution(sampler, logits.cuda()).cpu(), distribution(sampler, logits)
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-7, msg=lambda text, s=sampler: f"{s.name}: {text}")


def test_the_same_seed_draws_the_same_tokens(plugins: Plugins) -> None:
    """Rounding may decide between two tokens whose noisy scores are equal to seven digits; it hardly ever has to."""
    rows = 256
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(2)) * 2
    for sampler in samplers(plugins):
        here = controls_of(sampler, rows, V, seed=5)
        there = Controls.allocate(sampler, rows, V, torch.device("cuda"))
        for row in range(rows):
            there.set(row, check_params(sampler, {}), 5, row)
        drawn = sampler.sample(logits.cuda(), there).cpu()
        assert int((drawn != sampler.sample(logits, here)).sum()) <= 1, sampler.name


def test_a_text_is_the_same_at_every_run(plugins: Plugins, architecture: Architecture) -> None:
    model = tiny_model(architecture.name, backend="auto", plugins=plugins, dtype="bfloat16", device="cuda")
    texts = ["".join(model.generate("Once", max_tokens=50, seed=3)) for _ in range(2)]
    assert texts[0] == texts[1] != ""


@pytest.mark.usefixtures("little_memory")
def test_a_batch_that_does_not_fit_is_said_and_a_smaller_one_runs(plugins: Plugins) -> None:
    model = tiny_model(plugins=plugins, n_embd=256, head_size=64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_batch(["Hi"], rows=20_000, max_tokens=2)
    assert len(model.generate_batch(["Hi", "Ho"], rows=2, max_tokens=4, seed=1)) == 2


@pytest.mark.usefixtures("little_memory")
def test_rwkv_run_says_in_one_line_that_memory_does_not_suffice(tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"Hi"\n')
    result = rwkv_run(embedded_model(), "--prompts", str(prompts), "--output", str(output), "--rows", "4096")
    assert result.exit_code == 1
    assert result.stderr == "Error: out of memory; try fewer --rows, a smaller --dtype or another --device\n"


def test_nucleus_draws_by_its_kernels_what_it_draws_without(plugins: Plugins) -> None:
    logits = torch.randn(256, V, generator=torch.Generator().manual_seed(4)) * 2
    logits[::2] = logits[::2].round()
    sampler = plugins.sampler("nucleus")
    for params in ({}, {"top_p": 0.5, "temperature": 1.7}, {"top_p": 1.0, "top_k": 3}, {"temperature": 0}):
        controls = rows_of(sampler, 256, V, params)
        plain = controls.draw(sampler.filter(logits.cuda(), controls))
        assert int((sampler.sample(logits.cuda(), controls) != plain).sum()) <= 1


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.3, "temperature": 2.0}, {"top_p": 1.0}, {"temperature": 0}], ids=str
)
def test_nucleus_draws_the_same_however_many_programs_share_a_row(plugins: Plugins, params: dict[str, float]) -> None:
    """By the number of rows: all of a row's blocks a program each, some, or one for all; a hundred times over, since
    whichever program is the last decides."""
    sampler, rows, vocab = plugins.sampler("nucleus"), 300, 65536
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(6)).cuda()
    logits[::3] *= 4
    logits[::2] = logits[::2].bfloat16().float()  # ties
    logits[7, 65535], logits[8, 0], logits[9] = torch.nan, torch.inf, -torch.inf
    controls = rows_of(sampler, rows, vocab, params)
    together = sampler.sample(logits, controls)
    assert (together < 0).nonzero().flatten().tolist() == [7, 8, 9]
    plain = controls.draw(sampler.filter(logits, controls))
    assert int((together != plain).sum()) <= 1
    for size in (1, 10, 100):
        for _ in range(100 // size + 1):
            parts = [
                sampler.sample(logits[i : i + size], controls.view(i, min(i + size, rows)))
                for i in range(0, rows, size)
            ]
            assert torch.equal(torch.cat(parts), together), size


def rows_of(sampler: Sampler, rows: int, vocab_size: int, params: dict[str, float]) -> Controls:
    controls = Controls.allocate(sampler, rows, vocab_size, torch.device("cuda"))
    for row in range(rows):
        controls.set(row, check_params(sampler, params), 9, row)
    return controls

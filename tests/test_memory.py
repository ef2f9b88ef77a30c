"""What a CPU's draw costs beside arithmetic."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_runtime.controls import BLOCK, top

FAULTS = """
import resource, torch
from rwkv_runtime import Controls
from rwkv_samplers.nucleus import Nucleus
sampler = Nucleus()
controls, logits = Controls.allocate(sampler, 1, 65536, torch.device("cpu")), torch.randn(1, 65536)
def faults(draws):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(draws):
        sampler.sample(logits, controls)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)
print(faults(20) / 20)
"""


LOADED = """
import resource, torch
from helpers import tiny_config
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.loading import load_plugins
architectures = load_plugins().architectures
architecture = architectures.get("rwkv6")
build_model(architecture.random(tiny_config(architecture)), architectures, torch.device("cpu"))
def faults(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.zeros(512, 2048)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(5)
print(faults(20) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_loaded_model_finds_the_memory_of_a_prompt_where_it_left_it() -> None:
    """Without an engine too; in a process of its own, as below."""
    command, folder = [sys.executable, "-c", LOADED], Path(__file__).parent
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    assert float(printed) < 50  # a tensor of 4 MiB has 1,024 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_draw_asks_the_kernel_for_no_memory() -> None:
    """A process of its own: in this one, other tests' blocks have taught glibc already."""
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 50  # it was 480


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.sampled_from([7, BLOCK, BLOCK * 3, BLOCK * 3 + 1]), st.integers(0, 1000))
def test_the_largest_is_found_where_argmax_finds_it(rows: int, vocab_size: int, seed: int) -> None:
    """Among equals too."""
    scores = torch.randint(0, 4, (rows, vocab_size), generator=torch.Generator().manual_seed(seed)).float()
    best, ids = top(scores)
    assert torch.equal(best, scores.amax(dim=-1))
    assert torch.equal(ids, scores.argmax(dim=-1))

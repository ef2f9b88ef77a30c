"""How far a state in 16 bits moves predictions, as `benchmarks.state_error` measures it."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU

from benchmarks.state_error import HALVES, Reader, compare, main, remembered
from rwkv_runtime import Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model


def test_states_in_16_bits_are_compared() -> None:
    model = build_model(open_tensors(embedded_model()), Plugins.load().architectures, CPU, torch.float32)
    readers = [Reader(model, 3, kept) for kept in (torch.float32, *HALVES)]
    readers.append(Reader(model, 3, seen=torch.bfloat16))
    assert 0.5 < compare(model, readers, 3, 12) < 10
    same, half, brain, seen = (reader.bits for reader in readers)
    assert same == 0
    assert 0 < 10 * half < brain
    assert 0 < 2 * seen < brain


def test_a_state_of_fewer_bits_remembers_less() -> None:
    full, half, brain = (remembered(dtype, 0.999, 500) for dtype in (torch.float32, *HALVES))
    assert full < 1e-5 < 2 * half < brain < 0.1


def test_it_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--texts", "2", "--length", "3", "--tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 texts of 3 tokens, entropy ")
    assert lines[1].startswith("state in float16: ")
    assert lines[-1].startswith("state in bfloat16: ")

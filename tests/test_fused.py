"""The fused backend where there is no GPU: its kernels interpreted, its kernels compiled, its reasons to refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import CPU, built, controls_of, tiny_config
from rwkv_backends import fused
from rwkv_backends.fused import FAMILIES, Fused
from rwkv_backends.kernels.tuning import Tuning
from rwkv_samplers.nucleus import Nucleus, Packed

from rwkv_runtime.backend import Outcome
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins

INTERPRETED = Path(__file__).parent / "interpreted"


def interpreter_fails() -> bool:
    """Triton's interpreter before 3.7 turns arrays into scalars as numpy no longer does."""
    if find_spec("triton") is None:
        return False
    import numpy
    import triton

    old, new = ([int(n) for n in module.__version__.split(".")[:2]] for module in (triton, numpy))
    return old < [3, 7] and new >= [2, 4]


FEW = 48
"""Bytes of a thread that a kernel may spill, twelve registers: one version of Triton needs none where another does."""
MORE = {"spans_kernel": 128, "merge_kernel": 128}
"""For those that have all registers that there are."""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(fused.interpreted(), reason="Triton's interpreter is on, which compiles nothing")


@needs_triton
@pytest.mark.skipif(interpreter_fails(), reason="the interpreter of Triton before 3.7 needs numpy before 2.4")
@pytest.mark.skipif(fused.interpreted(), reason="they are collected by this very run")
def test_the_kernels_are_right_through_triton_s_interpreter() -> None:
    """Each file in a process of its own, as many at once as there are processors."""
    files = sorted(INTERPRETED.glob("test_*.py"), key=lambda file: -file.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(run_interpreted, files):
            assert done.returncode == 0, done.stdout + done.stderr


def run_interpreted(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("embd", "head_size", "vocab", "dtype", "quant"),
    [
        (2048, 64, 512, torch.bfloat16, None),
        (2560, 64, 512, torch.bfloat16, None),
        (768, 64, 300, torch.float16, "int8"),
        (320, 32, 257, torch.float32, None),
    ],
    ids=str,
)
def test_every_kernel_compiles_for_hopper_and_spills_next_to_nothing(
    architecture: Architecture,
    plugins: Plugins,
    embd: int,
    head_size: int,
    vocab: int,
    dtype: torch.dtype,
    quant: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large matrices are read sixteen bytes at a time, eight where rows are in pieces."""
    from sm90 import SHARED, as_on_a_gpu, compiled

    family, tuning = import_module(FAMILIES[architecture.name]), Tuning()
    config = architecture.sizes(2 if architecture.name == "rwkv7" else 1, embd, vocab, head_size)
    model = build_model(architecture.random(config, dtype=dtype), plugins.architectures, CPU, quant=quant)
    model = replace(model, weights=as_on_a_gpu(model.weights, dtype))
    steps = [(rows, 1) for rows in (1, 2, 3, tuning.skinny_rows, tuning.skinny_rows + 1)]
    shapes = [*steps, *((1, length) for length in tuning.prompts)]
    kernels = compiled(family.forward(model, tuning), model, shapes, monkeypatch)
    names = {kernel.name for kernel in kernels}
    assert names >= {"add_kernel", "key_value_kernel", "parts_kernel", "head_kernel", "carry_kernel"}
    assert names >= {"begin_kernel", "shift_kernel"}
    own = {
        "rwkv6": {"mixtures_kernel", "product_kernel"},
        "rwkv7": {"activate_kernel", "rows_kernel", "outputs_kernel"},
    }
    assert names >= own[architecture.name] - ({"product_kernel"} if dtype == torch.float32 else set())
    assert [(kernel.name, kernel.spilled) for kernel in kernels if kernel.spilled > MORE.get(kernel.name, FEW)] == []
    assert [(kernel.name, kernel.shared) for kernel in kernels if kernel.shared > SHARED] == []
    readers = {"kvrg_kernel", "rkv_kernel", "add_kernel", "key_value_kernel", "head_kernel"}
    for kernel in kernels:
        if kernel.name in readers:
            assert ("v2.b32" if embd == 2560 else "v4.b32") in kernel.ptx, kernel.name


@needs_triton
@needs_compiler
@pytest.mark.parametrize(("head_size", "dtype"), [(64, torch.bfloat16), (32, torch.float32)], ids=str)
def test_kernels_of_a_state_in_16_bits_compile_for_hopper_and_spill_next_to_nothing(
    architecture: Architecture, plugins: Plugins, head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sm90 import as_on_a_gpu, compiled

    config = architecture.sizes(2, 256, 260, head_size)
    model = build_model(architecture.random(config, dtype=dtype), plugins.architectures, CPU, state_dtype=torch.float16)
    model = replace(model, weights=as_on_a_gpu(model.weights, dtype))
    forward = import_module(FAMILIES[architecture.name]).forward(model, Tuning())
    kernels = compiled(forward, model, [(1, 1), (32, 1), (1, 2), (1, Tuning().span + 1)], monkeypatch)
    assert [kernel.name for kernel in kernels if kernel.spilled > MORE.get(kernel.name, FEW)] == []
    writers = {"rwkv6": {"wkv_kernel", "carry_kernel"}, "rwkv7": {"few_kernel", "rows_kernel", "carry_kernel"}}[
        architecture.name
    ]
    converting = {kernel.name for kernel in kernels if re.search(r"cvt\.rn\.f16(x2)?\.f32", kernel.ptx)}
    assert converting >= writers


@needs_triton
@needs_compiler
@pytest.mark.parametrize("state", [torch.float32, torch.float16], ids=str)
def test_kernels_of_a_state_that_is_seldom_written_compile_for_hopper(
    plugins: Plugins, state: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sm90 import as_on_a_gpu, compiled_by

    architecture, dtype = plugins.architectures.get("rwkv6"), torch.bfloat16
    config = architecture.sizes(2, 256, 260, 64)
    model = build_model(architecture.random(config, dtype=dtype), plugins.architectures, CPU, state_dtype=state)
    model = replace(model, weights=as_on_a_gpu(model.weights, dtype))
    backend = Fused()
    forward = import_module(FAMILIES[architecture.name]).forward(model, backend.tuning)
    tokens = torch.zeros(128, 1, dtype=torch.int64)
    kernels = compiled_by(lambda: forward(tokens, backend.new_state(model, 128)), monkeypatch)
    assert {kernel.name for kernel in kernels} >= {"decays_kernel", "deferred_kernel", "merge_kernel"}
    assert [kernel.name for kernel in kernels if kernel.spilled > MORE.get(kernel.name, FEW)] == []


@needs_triton
@needs_compiler
def test_the_first_layers_start_every_kernel_of_a_prompt(
    architecture: Architecture, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 RWKV-6 halves what it adds up, from the sixth layer on."""
    from sm90 import as_on_a_gpu, compiled

    family, tuning, dtype = import_module(FAMILIES[architecture.name]), Tuning(), torch.float16
    model = built(architecture.random(architecture.sizes(8, 64, 260, 32), dtype=dtype), plugins, dtype)
    model = replace(model, weights=as_on_a_gpu(model.weights, dtype))
    shapes = [(1, length) for length in tuning.prompts]
    short, whole = (
        {kernel.ptx for kernel in compiled(family.forward(m, tuning), m, shapes, monkeypatch)}
        for m in (fused.beginning(model), model)
    )
    assert short == whole


@needs_triton
@needs_compiler
@pytest.mark.parametrize("V", [260, 65536])
def test_the_kernels_of_nucleus_compile_for_hopper_and_spill_nothing(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_samplers.kernels import nucleus
    from sm90 import compiled_by

    logits = torch.zeros(3, V)
    controls = controls_of(Nucleus(), 3, V)
    kernels = compiled_by(lambda: nucleus.sample(logits, controls, *Packed.of(V)), monkeypatch)
    assert {kernel.name: kernel.spilled for kernel in kernels} == {"_best": 0, "_perturb": 0, "_draw": 0}


@needs_triton
@needs_compiler
def test_the_kernel_that_widens_logits_compiles_for_hopper_and_spills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row and of many, of every type, with a mask and without."""
    from rwkv_backends.kernels.widen import widen
    from sm90 import compiled_by

    def run() -> None:
        for dtype, rows in product((torch.float32, torch.bfloat16, torch.float16), (1, 5)):
            for mask in (None, torch.zeros(65536)):
                widen(torch.zeros(rows, 65536, dtype=dtype), mask, torch.zeros(rows, 65536))

    kernels = compiled_by(run, monkeypatch)
    assert {kernel.spilled for kernel in kernels} == {0}
    assert all("v4.b32" in kernel.ptx for kernel in kernels)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("refused", [False, True])
def test_the_kernel_that_ends_a_draw_compiles_for_hopper_and_spills_nothing(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_backends.kernels.settle import settle
    from sm90 import compiled_by

    rows = [torch.zeros(3, dtype=torch.int64), *(torch.zeros(3, 1, dtype=torch.int64) for _ in range(3))]
    kernels = compiled_by(lambda: settle(rows[0], torch.zeros(3, 65536), refused, Outcome(*rows)), monkeypatch)
    assert {kernel.name: kernel.spilled for kernel in kernels} == {"settle_kernel": 0}


def test_it_says_what_is_missing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert Fused().why_not(None) == "Triton is not installed"
    monkeypatch.setattr(fused, "find_spec", find_spec)
    if find_spec("triton"):
        assert Fused().why_not(model) == "it needs a CUDA device"


@needs_triton
def test_it_says_what_it_cannot_run(
    architecture: Architecture, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reasons that lie in the model, with the interpreter in the place of a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = built(architecture.random(tiny_config(architecture)), plugins)
    assert Fused().why_not(model) is None
    odd = replace(model, config=replace(model.config, head_size=24))
    assert Fused().why_not(odd) == "its heads are of 24; there are kernels for 16, 32, 64, 128"
    assert Fused().why_not(replace(model, dtype=torch.float64)) == "there are no kernels for float64"
    assert "bfloat16" in str(Fused().why_not(replace(model, dtype=torch.bfloat16)))
    monkeypatch.setattr(fused, "FAMILIES", {})
    assert Fused().why_not(model) == f"it has no kernels for {architecture.name}"


@needs_triton
def test_it_says_what_the_gpu_lacks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = replace(model, device=torch.device("cuda", 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert Fused().why_not(on_gpu) == "it needs a GPU of compute capability 8.0 or later"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert Fused().why_not(replace(on_gpu, dtype=torch.bfloat16)) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter is on" in str(Fused().why_not(on_gpu))


def test_where_it_can_be_used_it_is_taken_before_the_others(plugins: Plugins) -> None:
    assert next(iter(sorted(plugins.backends, key=lambda b: -b.priority))).name == "fused"


class Steps(Fused):
    """Notes what its warming up does, in place of doing it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: set[str] = set()
        patch.setattr(fused, "_begin_triton", lambda device: self.steps.add(f"triton {device}"))
        patch.setattr(fused, "_begin_cublas", lambda device: self.steps.add(f"cublas {device}"))
        patch.setattr(fused, "import_module", self.steps.add)

    def _begin(self, model: Model) -> None:
        self.steps.add(f"kernels of {model.architecture.name}")


def test_what_needs_no_model_warms_up_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Steps(monkeypatch)

    def none() -> Model:
        raise CancelledError

    with pytest.raises(CancelledError):
        backend.warm_up(torch.device("cuda", 1), none)
    assert backend.steps == {"triton cuda:1", "cublas cuda:1"}


def test_kernels_warm_up_of_a_family_that_has_them(
    architecture: Architecture, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"triton cuda:1", "cublas cuda:1"}
    own = {FAMILIES[architecture.name], f"kernels of {architecture.name}"}
    backend = Steps(monkeypatch)
    backend.warm_up(torch.device("cuda", 1), lambda: model)
    assert backend.steps == both | own
    monkeypatch.setattr(architecture, "name", "foreign")
    backend = Steps(monkeypatch)
    backend.warm_up(torch.device("cuda", 1), lambda: model)
    assert backend.steps == both


def test_nothing_warms_up_on_a_cpu(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Steps(monkeypatch)
    backend.warm_up(CPU, lambda: model)
    assert backend.steps == set()


def test_one_that_cannot_is_heard_of_when_all_has_begun(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Steps(monkeypatch)

    def fails(device: torch.device) -> None:
        raise OSError("no assembler")

    monkeypatch.setattr(fused, "_begin_triton", fails)
    with pytest.raises(OSError, match="no assembler"):
        backend.warm_up(torch.device("cuda", 1), lambda: model)
    assert f"kernels of {model.architecture.name}" in backend.steps

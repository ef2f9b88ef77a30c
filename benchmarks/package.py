"""The `rwkv` package, the reference implementation, beside this runtime in one process.

What it is asked for is read from variables when its module is imported: RWKV_V7_ON chooses between RWKV-7 and the
versions before it, RWKV_CUDA_ON has it build kernels for prompts. So that rounds can be paired with rounds of it for
every architecture in one run, its module is executed once for each, under a name of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import Checkpoint

PACKAGE = "rwkv package"
SWITCHES = {"rwkv6": {"RWKV_V7_ON": "0"}, "rwkv7": {"RWKV_V7_ON": "1"}}
"""What its module has to find set, by the architecture that it shall run."""
STRATEGIES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def why_no_package(architecture: str | None = None) -> str | None:
    """None where the package is installed and knows the architecture."""
    if not find_spec("rwkv"):
        return "the rwkv package is not installed"
    if architecture and architecture not in SWITCHES:
        return f"the rwkv package is not known to run {architecture}"
    return None


def import_package(device: torch.device) -> str:
    """Imports it for every architecture; returns whether it has kernels of its own, for the report.

    Done before anything is compiled: importing it sets flags of torch for the whole process, and torch.compile would
    compile anew when a flag changes.
    """
    kernels = why_no_kernels(device)
    try:
        for architecture in SWITCHES:
            _module(architecture, "0" if kernels else "1")
    except Exception as error:  # whatever its build of CUDA sources raises: it runs without, and the report says so
        if kernels:
            raise
        kernels = f"they do not build: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        for architecture in SWITCHES:
            _module(architecture, "0")
    return f"without its CUDA kernels ({kernels})" if kernels else "with its CUDA kernels for prompts"


def why_no_kernels(device: torch.device) -> str | None:
    """None where its CUDA kernels can be built."""
    if device.type != "cuda":
        return "not on a GPU"
    if os.environ.get("RWKV_CUDA_ON") == "0":
        return "RWKV_CUDA_ON=0 is set"
    missing = [tool for tool in ("nvcc", "ninja", "c++") if not shutil.which(tool)]
    return f"there is no {', '.join(missing)}" if missing else None


def module_name(architecture: str) -> str:
    return f"benchmarks.package.{architecture}"


def _module(architecture: str, kernels: str) -> ModuleType:
    found = find_spec("rwkv.model")
    assert found is not None
    assert found.origin is not None
    spec = spec_from_file_location(module_name(architecture), found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.jit looks classes up there
    with switched(SWITCHES[architecture] | {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": kernels}), silence():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def switched(variables: dict[str, str]) -> Iterator[None]:
    """The variables are set inside; RWKV_CUDA_ON and RWKV_JIT_ON stay, for the package reads them later too."""
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.pop("RWKV_V7_ON", None)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """It prints what it is asked for and every tensor that it loads."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Package:
    """A checkpoint in it. It has no batches: several rows are read one after another."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        module = sys.modules[module_name(checkpoint.architecture.name)]
        with silence():
            self.model = module.RWKV(str(checkpoint.pth.with_suffix("")), f"{device} {STRATEGIES[checkpoint.dtype]}")

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self.model.forward(list(tokens), None)[0] for tokens in prompts])

    def decoder(self, rows: int) -> PackageDecoder:
        return PackageDecoder(self.model, rows)


class PackageDecoder:
    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.states: list[Any] = [None] * rows
        self.tokens: Sequence[int] = [0] * rows

    def feed(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def step(self) -> Tensor:
        rows = []
        for row, token in enumerate(self.tokens):
            logits, self.states[row] = self.model.forward([token], self.states[row])
            rows.append(logits)
        return torch.stack(rows) if len(rows) > 1 else rows[0][None]

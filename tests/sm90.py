"""Compiles for a Hopper GPU, on a machine without one, every kernel that a forward pass starts."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rwkv_runtime import Forward, Model

SHARED = 99 * 1024
"""Bytes that one program may have of what a multiprocessor's threads share, on the smallest GPU that `fused` is for."""


class Compiled(NamedTuple):
    """A kernel in the form that one start of it asks for."""

    name: str
    ptx: str
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes of memory that a program's threads share


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(
    forward: Forward, model: Model, shapes: list[tuple[int, int]], patch: pytest.MonkeyPatch
) -> list[Compiled]:
    """The kernels of the forward pass on tokens [B, T] of these shapes."""

    def passes() -> None:
        for B, T in shapes:
            forward(torch.zeros(B, T, dtype=torch.int64), model.new_state(B))

    return compiled_by(passes, patch)


def compiled_by(run_all: Callable[[], object], patch: pytest.MonkeyPatch) -> list[Compiled]:
    """Runs it with kernels that are compiled and never started."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *args: object, grid: object, warmup: bool, **options: object):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = (self.__name__, kernel)
        return kernel

    patch.setattr(driver, "_active", Hopper())
    patch.setattr(JITFunction, "run", compile_only)
    run_all()
    return [
        Compiled(name, kernel.asm["ptx"], *usage(kernel.asm["cubin"]), kernel.metadata.shared)
        for name, kernel in kernels.values()
    ]


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def as_on_a_gpu(weights: tuple, dtype: torch.dtype) -> tuple:
    """Weights whose adapters are of the model's dtype; RWKV-6's are float32 on a CPU."""
    adapters = ("maa_x", "maa_w1", "maa_w2", "decay_w1", "decay_w2")
    blocks = []
    for block in weights.blocks:
        cast: dict[str, Tensor] = {n: getattr(block.att, n).to(dtype) for n in adapters if hasattr(block.att, n)}
        blocks.append(block._replace(att=block.att._replace(**cast)))
    return weights._replace(blocks=tuple(blocks))

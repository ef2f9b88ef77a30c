"""torch.compile: the whole decode step, sampling included, as one compiled graph.

Prompts run as plain PyTorch: large matrix products gain nothing from being compiled, and every length
of chunk would be compiled anew. On a GPU the compiled step is captured here: a state that is updated in place makes
inductor skip its own CUDA graphs. What inductor compiled, it keeps on disk for the next start. Kernels are not tuned by
trying unless torch's own variable, TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1, asks for it: that takes minutes, and most
of them again at each start (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from rwkv_backends.graphs import Graphs
from rwkv_runtime import Backend, Forward, Model, Tick, hookimpl

logger = logging.getLogger("rwkv_runtime")


class Compile(Backend):
    name = "compile"
    summary = "the whole decode step through torch.compile; slow to start the first time"
    priority = 10

    def __init__(self) -> None:
        self._graphs = Graphs()
        self._announced = False

    def why_not(self, model: Model | None) -> str | None:
        if not torch._dynamo.is_dynamo_supported():  # type: ignore[attr-defined]
            return "torch.compile does not support this Python"
        if model is not None and model.device.type == "cuda":
            return None if find_spec("triton") else "Triton is not installed"
        # What inductor itself would call: it looks for no other compiler.
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler):
            return None
        return f"no C++ compiler found: there is no {compiler}; install it, or name another in the variable CXX"

    def forward(self, model: Model) -> Forward:
        return partial(model.architecture.forward, model.architecture.ops, model.weights)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        if not self._announced:  # several sizes of batch are one wait
            logger.info("preparing the decode step: minutes the first time, seconds once it is compiled")
            self._announced = True
        gpu = buffers[0].is_cuda
        saved = [buffer.clone() for buffer in buffers]
        compiled: Tick = torch.compile(_own_code(tick), fullgraph=True, dynamic=False)
        with _unheard_warnings():
            compiled()  # compiles now, so that a failure shows here
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
        return self._graphs.capture(compiled, buffers) if gpu else compiled


@contextlib.contextmanager
def _unheard_warnings() -> Iterator[None]:
    """Inside, what torch logs and warns of is kept from the user: what fails is raised as well, and told in a line.

    TORCH_LOGS, torch's own way to ask for more, brings all of it back.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    torch_logger = logging.getLogger("torch")
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)


def _own_code(tick: Tick) -> Tick:
    """The same closure with a code object of its own.

    Dynamo counts recompilations by code object; ticks of several models and batch sizes, all made by one
    line of the engine, would use up one limit together.
    """
    if not isinstance(tick, types.FunctionType):
        return tick
    code = tick.__code__.replace(co_name=f"tick_{id(tick)}")
    return types.FunctionType(code, tick.__globals__, code.co_name, tick.__defaults__, tick.__closure__)


@hookimpl
def rwkv_backends() -> list[Backend]:
    return [Compile()]

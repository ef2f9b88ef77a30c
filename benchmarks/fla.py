"""flash-linear-attention's kernels for the WKV recurrence of RWKV-6, in the place of this runtime's own.

Everything else is as the plainest backend runs it, so that prompts and batches show what the recurrence alone costs.
Its `scale` is of other models: RWKV's is 1. Decays are given as logarithms, states are float32 [B, H, K, V].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import FunctionType
from typing import Any

from torch import Tensor

from rwkv_runtime import Backend, Forward, Model

FLA = "fla wkv"
ARCHITECTURE = "rwkv6"
OP, PART = "time_mixing", "attended"
"""The op, and what in it calls the recurrence."""
STEP, CHUNKED = "wkv_step", "wkv_chunked"
"""What that calls, by the names in its module: (r, k, v, log_w [B, T, H, N], u [H, N], state in place) -> out."""


class FlaWkv(Backend):
    name = FLA

    def why_not(self, model: Model | None) -> str | None:
        if not find_spec("fla"):
            return "fla-core is not installed"
        if model is None:
            return None
        if model.device.type != "cuda":
            return "its kernels are for GPUs"
        if model.architecture.name != ARCHITECTURE:
            return f"put in place for {ARCHITECTURE} only"
        op: Any = model.architecture.ops.get(OP)
        missing = [name for name in (PART, STEP, CHUNKED) if name not in getattr(op, "__globals__", {})]
        return f"{OP} calls no {', '.join(missing)} that could be replaced" if missing else None

    def forward(self, model: Model) -> Forward:
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6

        names = {STEP: in_place(fused_recurrent_rwkv6), CHUNKED: in_place(chunk_rwkv6)}
        ops = {**model.architecture.ops, OP: with_recurrence(model.architecture.ops[OP], names)}
        return partial(model.architecture.forward, ops, model.weights)


def in_place(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A kernel that returns the last state, as one that updates it."""

    def wkv(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, s: Tensor) -> Tensor:
        r, k, v = (t.contiguous() for t in (r, k, v))
        out, last = kernel(r, k, v, log_w, u, scale=1.0, initial_state=s, output_final_state=True)
        s.copy_(last)
        return out.float()

    return wkv


def with_recurrence(op: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The op with other meanings of the names that its part calls."""
    part = op.__globals__[PART]  # type: ignore[attr-defined]
    return calling(op, {PART: calling(part, names)})


def calling(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """The same function, with other meanings of some names of its module."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__, function.__globals__ | names, function.__name__, function.__defaults__)

"""TorchScript: each op of the architecture compiled by torch.jit.script, without a C++ compiler."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from rwkv_runtime import Backend, BackendError, Forward, Model, hookimpl


class Script(Backend):
    name = "script"
    summary = "each op through torch.jit.script; needs no compiler"
    priority = 20

    def forward(self, model: Model) -> Forward:
        architecture = model.architecture
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: the user asked for it by name
                ops = {name: torch.jit.script(op) for name, op in architecture.ops.items()}
        except Exception as error:  # TorchScript raises many types, some without a message
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(f"torch.jit.script cannot read {architecture.name}'s ops: {reason[0]}") from error
        return partial(architecture.forward, ops, model.weights)


@hookimpl
def rwkv_backends() -> list[Backend]:
    return [Script()]

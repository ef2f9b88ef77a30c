"""Decode steps in C for the CPU: one call a step, which does nothing but read the weights once.

A step of a few rows takes as long as memory takes to give out the weights; everything else has to be hidden behind
that. Prompts and larger batches are bound by arithmetic, which torch's matrix products do best: they go through the
architecture's own forward pass, in which a family may put C in place of what is between the products of a prompt.
"""

from __future__ import annotations

import ctypes
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from rwkv_backends.native import build, rwkv6, rwkv7
from rwkv_backends.native.structs import DTYPES, Packer, StateTensor, state_tensor
from rwkv_backends.native.team import find_team
from rwkv_runtime import Backend, BackendError, Forward, Model, State, hookimpl

ROWS = 16
"""Of larger batches torch's matrix products make more."""
FAMILIES: dict[str, ModuleType] = {"rwkv6": rwkv6, "rwkv7": rwkv7}
"""By the name of the architecture; the C is in a file of the same name."""
WEIGHTS = 1 << 16
"""Of a layer, for each thread: with fewer, threads wait for each other longer than they work."""
STATES = ("att_x_prev", "att_kv", "ffn_x_prev")


class Native(Backend):
    name = "native"
    summary = "decode steps in C for the CPU, compiled here at first use; prompts as eager"
    priority = 40

    def why_not(self, model: Model | None) -> str | None:
        if (reason := build.why_not()) is not None:
            return reason
        if find_team() is None:
            return "torch has no OpenMP library here, whose threads it would use"
        if model is None:
            return None
        if model.device.type != "cpu":
            return f"it runs on the CPU, the model is on {model.device}"
        if model.architecture.name not in FAMILIES:
            return f"it knows {' and '.join(FAMILIES)}, the model is {model.architecture.name}"
        if model.dtype not in DTYPES:
            return f"it does not know weights of {model.dtype}"
        if model.state_dtype != torch.float32:
            return "its states are float32 alone (leave out the state dtype)"
        return None

    def forward(self, model: Model) -> Forward:
        return Step(model)


class Step:
    """The forward pass of one model."""

    def __init__(self, model: Model) -> None:
        """Raises BackendError where the code does not compile."""
        family = FAMILIES[model.architecture.name]
        name = model.architecture.name
        library = build.library(f"{name}.c")
        team = find_team()
        if team is None:
            raise BackendError("torch has no OpenMP library here")
        sizes = [library[f"{name}_sizes"](ctypes.c_int64(i)) for i in range(len(family.SIZES))]
        assert sizes == [ctypes.sizeof(kind) for kind in family.SIZES], "C and Python disagree on a structure"
        self.team, self.packer = team, Packer()
        self.model = family.pack(model, self.packer)
        self.vocab_size = model.config.vocab_size
        self.most_threads = max(1, family.layer_weights(model) // WEIGHTS)
        self.scratch_size, self.step = library[f"{name}_scratch"], library[f"{name}_step"]
        self.scratch_size.restype = ctypes.c_int64
        ops = {**model.architecture.ops, **family.prompt_ops(library, team)}
        self.prompt: Forward = partial(model.architecture.forward, ops, model.weights)

    def __call__(self, tokens: Tensor, state: State, every: bool = False) -> Tensor:
        B, T = tokens.shape
        states = [state[name] for name in STATES]
        if T != 1 or B > ROWS or not all(t[0, 0].is_contiguous() for t in states):
            return self.prompt(tokens, state, every)
        threads = min(torch.get_num_threads(), self.most_threads)
        tokens = tokens.contiguous()
        size = self.scratch_size(ctypes.byref(self.model), ctypes.c_int64(B), ctypes.c_int64(threads))
        scratch = torch.empty(size, dtype=torch.float32)
        logits = torch.empty((B, self.vocab_size), dtype=torch.float32)
        failed = self.step(
            ctypes.byref(self.team),
            ctypes.byref(self.model),
            (StateTensor * len(STATES))(*map(state_tensor, states)),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_int64(B),
            ctypes.c_int64(threads),
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
        )
        if failed:
            raise IndexError(f"token ids are from 0 to {self.vocab_size - 1}, not {tokens.flatten().tolist()}")
        return logits.unsqueeze(1) if every else logits


@hookimpl
def rwkv_backends() -> list[Backend]:
    return [Native()]

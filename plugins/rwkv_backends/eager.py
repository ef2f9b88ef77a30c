"""Plain PyTorch: runs everywhere, starts at once, and is what the other backends are compared with."""

from __future__ import annotations

from functools import partial

from rwkv_runtime import Backend, Forward, Model, hookimpl


class Eager(Backend):
    name = "eager"
    summary = "plain PyTorch; runs everywhere and starts at once"
    priority = 30

    def forward(self, model: Model) -> Forward:
        return partial(model.architecture.forward, model.architecture.ops, model.weights)


@hookimpl
def rwkv_backends() -> list[Backend]:
    return [Eager()]

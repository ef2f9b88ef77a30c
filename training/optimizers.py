"""Which parameter is learnt how, and the update of a step, on a GPU captured as one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.model import StoryModel
from training.muon import Muon

EAGER_STEPS = 3
"""Updates that are run before one is captured: compilers and libraries set themselves up in them."""


def make_optimizers(model: StoryModel, rate: float, weight_decay: float, use_muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the layers' large matrices and AdamW for the rest, adapters too, or AdamW for all.

    Large matrices with weight decay, the rest without; base decay and bonus at twice the rate, too (``scale`` of a
    group).
    """
    hidden, decayed, plain, double = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("time_decay", "time_faaaa")):
            double.append(parameter)
        elif not name.endswith("weight") or parameter.ndim != 2:
            plain.append(parameter)
        elif use_muon and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    on_gpu = plain[0].is_cuda

    def group(parameters: list[nn.Parameter], decay: float, scale: float = 1.0) -> dict[str, Any]:
        # A captured update reads its learning rate from the device.
        lr = torch.tensor(rate, device=plain[0].device) if on_gpu else rate
        return {"params": parameters, "weight_decay": decay, "scale": scale, "lr": lr}

    groups = [group(decayed, weight_decay), group(plain, 0.0), group(double, 0.0, 2.0)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-9, fused=on_gpu, capturable=on_gpu)
    return [Muon([group(hidden, weight_decay)], momentum=0.95), adamw] if hidden else [adamw]


def restore(optimizers: list[torch.optim.Optimizer], saved: list[dict[str, Any]]) -> None:
    """What optimizers remembered, as `state_dict` gave it; how they are run here is not part of that.

    Raises:
        ValueError: it is of other optimizers.
    """
    if len(saved) != len(optimizers):
        raise ValueError("the checkpoint is of a run with another --optimizer")
    for optimizer, content in zip(optimizers, saved, strict=True):
        own = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": content["state"], "param_groups": own})


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """The learning rate of the next update, times each group's scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]


class Update:
    """Loss, gradients and optimizers for one batch: what a step does on the device."""

    def __init__(self, model: StoryModel, optimizers: list[torch.optim.Optimizer], clip: float) -> None:
        self.model, self.optimizers, self.clip = model, optimizers, clip

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] -> mean loss (nats a token) and norm of the gradient, both on the device."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.model.losses(inputs, targets).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach(), norm


class CapturedUpdate:
    """An update as one CUDA graph, so that the GPU never waits for Python; the first few run as they are.

    Dropout follows the default generator's seed as it is at each replay.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self.eager_steps = EAGER_STEPS
        self.side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs, self.targets, self.loss, self.norm = (torch.empty(0) for _ in range(4))

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `Update`, for batches of one shape.

        Raises:
            RuntimeError: something in it waits for the device.
            ValueError: the shape is another one than was captured.
        """
        if self.inputs.shape != inputs.shape:
            if self.graph is not None:
                raise ValueError(f"captured for batches of {list(self.inputs.shape)}, not of {list(inputs.shape)}")
            # Compiled code is for one layout: that of these buffers, before the capture too.
            self.inputs, self.targets = (x.clone(memory_format=torch.contiguous_format) for x in (inputs, targets))
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        if self.eager_steps:
            self.eager_steps -= 1
            return self._aside()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss, self.norm = self.update(self.inputs, self.targets)
        self.graph.replay()
        return self.loss.clone(), self.norm.clone()

    def _aside(self) -> tuple[Tensor, Tensor]:
        """On a stream of its own, as a capture is."""
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            results = self.update(self.inputs, self.targets)
        current.wait_stream(self.side)
        return results

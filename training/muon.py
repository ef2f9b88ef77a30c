"""Muon: momentum whose matrices are made orthogonal, for the matrices inside the layers.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; weight decay and the scale that gives
updates the size of AdamW's, so that both take the same learning rate, are of Liu et al. 2025, arXiv 2502.16982.
Matrices of one shape are orthogonalised together, and the learning rate may be a tensor: a step can be captured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ITERATIONS = 5
ADAMW_SIZE = 0.2  # root mean square of AdamW's usual updates


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, a, b] -> the same with all singular values near 1, by Newton-Schulz in bf16."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = first * x + (second * square + third * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, with Nesterov momentum and decoupled weight decay."""

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 3e-3, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one shape [a, b]."""
        gradients = [parameter.grad for parameter in parameters]
        moving = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(moving, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, moving, group["momentum"])
        scale = ADAMW_SIZE * max(parameters[0].shape) ** 0.5
        updates = orthogonalised(torch.stack(ahead)) * (scale * group["lr"])
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, list(updates.unbind()))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum

"""Penalties on tokens that are there already."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, TensorSpec, hookimpl
from rwkv_samplers.selection import bounded


class Penalties(Sampler):
    """Repetition as in Keskar et al., CTRL (2019), and Hugging Face: z > 0 ? z / r : z r, over prompt and output.

    Presence and frequency as in OpenAI's API: z -= count frequency + [count > 0] presence, over the output alone.
    Repetition comes first.
    """

    name = "penalties"
    summary = "lowers what is in the prompt or the output already (repetition), or in the output (presence, frequency)"
    params = {
        "repetition": Param(1.0, 0.01, 100.0, "divides positive logits, multiplies negative ones", off=1.0),
        "presence": Param(0.0, -2.0, 2.0, "taken off the logits of tokens in the output", off=0.0),
        "frequency": Param(0.0, -2.0, 2.0, "taken off for each time a token is in the output", off=0.0),
    }
    runs = "graph"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        shape = (vocab_size,)
        return {"prompt_has": TensorSpec(shape, torch.bool), "output_count": TensorSpec(shape, torch.float32)}

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        controls.slots["prompt_has"][0, tokens] = True

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        count, repetition = controls.slots["output_count"], controls["repetition"]
        written = count > 0
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        penalised = torch.where(written | controls.slots["prompt_has"], repeated, logits)
        penalised = penalised - count * controls["frequency"] - written * controls["presence"]
        return bounded(logits, penalised)

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        _count(controls.slots["output_count"], tokens)


class RwkvAlpha(Sampler):
    """The `rwkv` package's penalties: z -= alpha_presence + c alpha_frequency for every token written.

    c counts how often, and decays: at each step it is multiplied by alpha_decay, then the drawn token's grows by 1.
    """

    name = "rwkv-alpha"
    summary = "lowers what has been written, the longer ago the less (alpha_presence, alpha_frequency, alpha_decay)"
    params = {
        "alpha_presence": Param(0.0, -100.0, 100.0, "taken off the logits of tokens in the output", off=0.0),
        "alpha_frequency": Param(0.0, -100.0, 100.0, "taken off for each time, as far as it has not decayed", off=0.0),
        "alpha_decay": Param(0.996, 0.0, 1.0, "what is left of each count a step later; at 1 nothing decays"),
    }
    runs = "graph"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        shape = (vocab_size,)
        return {"alpha_written": TensorSpec(shape, torch.float32), "alpha_count": TensorSpec(shape, torch.float32)}

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        written = controls.slots["alpha_written"] * controls["alpha_presence"]
        return bounded(logits, logits - written - controls.slots["alpha_count"] * controls["alpha_frequency"])

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        controls.slots["alpha_count"].mul_(controls["alpha_decay"])
        _count(controls.slots["alpha_count"], tokens)
        _count(controls.slots["alpha_written"], tokens).clamp_(max=1.0)


def _count(counts: Tensor, tokens: Tensor) -> Tensor:
    """Adds 1 for the token [B] of each row to its counts [B, V], in place; nothing for -1."""
    token = tokens[:, None]
    return counts.scatter_add_(-1, token.clamp(min=0), (token >= 0).to(counts.dtype))


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Penalties(), RwkvAlpha()]

"""Samplers that keep the shortest prefix of some order: top-k, top-p, typical."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.selection import keep, mass, ones, prefix, share_of


def k_likeliest(logits: Tensor, k: Tensor) -> Tensor:
    """Exactly the k [B, 1] largest; all where k is 0 or more than there are."""
    everything = logits.shape[-1] + 1
    return keep(logits, prefix(logits, ones(logits), torch.where(k > 0, k, everything)))


def p_likeliest(logits: Tensor, p: Tensor) -> Tensor:
    """The fewest of the likeliest tokens that have the probability p [B, 1] together, or more."""
    weight = mass(logits)
    return keep(logits, prefix(logits, weight, share_of(weight.sum(dim=-1, keepdim=True), p)))


class TopK(Sampler):
    """Fan, Lewis and Dauphin, Hierarchical Neural Story Generation (2018)."""

    name = "top-k"
    summary = "exactly the k likeliest tokens, the lower id first among equals"
    params = {"top_k": Param(40, 0, 1 << 31, "how many of the likeliest tokens are kept", off=0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return k_likeliest(logits, controls["top_k"])


class TopP(Sampler):
    """Holtzman et al., The Curious Case of Neural Text Degeneration (2020)."""

    name = "top-p"
    summary = "the fewest likeliest tokens whose probabilities reach top_p together"
    params = {"top_p": Param(0.95, 0.0, 1.0, "mass of the likeliest tokens that is kept; 0 is greedy", off=1.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return p_likeliest(logits, controls["top_p"])


class Typical(Sampler):
    """Meister et al., Locally Typical Sampling (2023): the order is abs(-ln p - H), H the entropy."""

    name = "typical"
    summary = "the fewest tokens, from the most typically surprising on, whose probabilities reach typical_p"
    params = {"typical_p": Param(0.95, 0.0, 1.0, "mass of the most typical tokens that is kept", off=1.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1)
        weight = mass(logits)
        target = share_of(weight.sum(dim=-1, keepdim=True), controls["typical_p"])
        return keep(logits, prefix(-(log_p + entropy(log_p)).abs(), weight, target))


def entropy(log_p: Tensor) -> Tensor:
    """In nats, [B, 1]; a token of probability 0 adds nothing."""
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(dim=-1, keepdim=True)


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [TopK(), TopP(), Typical()]

"""Samplers that keep what reaches a floor: min-p, epsilon, eta, top-n-sigma."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.prefixes import entropy
from rwkv_samplers.selection import at_least


def above_share(logits: Tensor, share: Tensor) -> Tensor:
    """Tokens with at least a share [B, 1] of the best one's probability."""
    return at_least(logits, logits.amax(dim=-1, keepdim=True) + share.log())


class MinP(Sampler):
    """Nguyen et al., Turning Up the Heat: Min-p Sampling (2024): p >= m p_max, that is z >= z_max + ln m."""

    name = "min-p"
    summary = "tokens with at least the share min_p of the likeliest one's probability"
    params = {"min_p": Param(0.05, 0.0, 1.0, "least probability, as a share of the likeliest token's", off=0.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return above_share(logits, controls["min_p"])


class Epsilon(Sampler):
    """Hewitt, Manning and Liang, Truncation Sampling as Language Model Desmoothing (2022): p >= epsilon."""

    name = "epsilon"
    summary = "tokens whose probability is at least epsilon"
    params = {"epsilon": Param(3e-4, 0.0, 1.0, "least probability", off=0.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return at_least(logits, logits.logsumexp(dim=-1, keepdim=True) + controls["epsilon"].log())


class Eta(Sampler):
    """Hewitt, Manning and Liang (2022): p >= min(eta, sqrt(eta) exp(-H)), H the entropy."""

    name = "eta"
    summary = "tokens whose probability is at least eta, or less where the model is unsure"
    params = {"eta": Param(3e-4, 0.0, 1.0, "least probability; lower where the entropy is high", off=0.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        log_eta = controls["eta"].log()
        unsure = log_eta / 2 - entropy(torch.log_softmax(logits, dim=-1))
        return at_least(logits, logits.logsumexp(dim=-1, keepdim=True) + torch.minimum(log_eta, unsure))


class TopNSigma(Sampler):
    """Tang et al., Top-nsigma: Not All Logits Are You Need (2024): z >= z_max - n sigma.

    sigma is the population's standard deviation over the logits that are finite, as in llama.cpp.
    """

    name = "top-n-sigma"
    summary = "tokens whose logit is within n standard deviations of the best"
    params = {"top_n_sigma": Param(1.0, -1.0, 1000.0, "how many standard deviations; below 0 is off", off=-1.0)}
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        n = controls["top_n_sigma"]
        best = logits.amax(dim=-1, keepdim=True)
        finite = logits > -torch.inf
        count = finite.sum(dim=-1, keepdim=True)
        below = torch.where(finite, best - logits, 0.0)  # float32 holds these closely, however large the logits are
        mean = below.sum(dim=-1, keepdim=True) / count
        variance = torch.where(finite, (below - mean).square(), 0.0).sum(dim=-1, keepdim=True) / count
        return at_least(logits, torch.where(n < 0, -torch.inf, best - n * variance.sqrt()))


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [MinP(), Epsilon(), Eta(), TopNSigma()]

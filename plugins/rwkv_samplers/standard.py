"""Temperature, top-k, top-p and min-p in one sampler, in the order of Hugging Face's generate()."""

from __future__ import annotations

from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl
from rwkv_samplers.floors import above_share
from rwkv_samplers.prefixes import k_likeliest, p_likeliest
from rwkv_samplers.temperature import TEMPERATURE, tempered


class Standard(Sampler):
    """Each stage sees what the one before it has left, its probabilities summing to 1 again."""

    name = "standard"
    summary = "temperature, then top-k, then top-p, then min-p; neutral until told"
    params = {
        "temperature": TEMPERATURE,
        "top_k": Param(0, 0, 1 << 31, "how many of the likeliest tokens are kept", off=0),
        "top_p": Param(1.0, 0.0, 1.0, "mass of the likeliest tokens that is kept; 0 is greedy", off=1.0),
        "min_p": Param(0.0, 0.0, 1.0, "least probability, as a share of the likeliest token's", off=0.0),
    }
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        logits = tempered(logits, controls["temperature"], controls.ids)
        logits = p_likeliest(k_likeliest(logits, controls["top_k"]), controls["top_p"])
        return above_share(logits, controls["min_p"])


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Standard()]

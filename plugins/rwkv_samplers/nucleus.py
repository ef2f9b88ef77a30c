"""RWKV's own nucleus sampling: top-k and top-p on the plain probabilities, then temperature on what is kept.

The order and the exact mass are those of BlinkDL's RWKV demo programs: the kept tokens hold exactly
`top_p` before the temperature is applied, the last of them being cut down to fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, hookimpl


class Nucleus(Sampler):
    name = "nucleus"
    summary = "top-k, then exactly the top_p likeliest mass, then temperature (RWKV's own order)"
    params = {
        "temperature": Param(1.0, 0.0, 1000.0, "flattens (> 1) or sharpens (< 1) what is kept; 0 is greedy", off=1.0),
        "top_p": Param(0.8, 0.0, 1.0, "mass of the likeliest tokens that is kept; 0 is greedy", off=1.0),
        "top_k": Param(0, 0, 1 << 31, "how many of the likeliest tokens are kept", off=0),
    }
    runs = "graph"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        temperature, top_p, top_k = controls["temperature"], controls["top_p"], controls["top_k"]
        # Sorted before the softmax, whose rounding could make equals of the two best; in log space, since
        # p ** (1 / T) underflows to all zeros at a small T.
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)  # [B, V]
        log_p = torch.log_softmax(logits, dim=-1)
        rank = torch.arange(log_p.shape[-1], device=log_p.device)
        kept = (rank < torch.where(top_k > 0, top_k, rank.numel())) & (log_p > -torch.inf)
        greedy = (temperature == 0) | (top_p == 0)
        log_weight = torch.where(top_p < 1, _exact_mass(log_p, kept, top_p), log_p)
        log_weight = log_weight.masked_fill(~torch.where(greedy, rank == 0, kept), -torch.inf)
        log_weight = torch.where(greedy & (rank == 0), log_p, log_weight)
        best = log_weight.amax(dim=-1, keepdim=True)
        scaled = (log_weight - best) / torch.where(greedy, 1.0, temperature)
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, scaled)


def _exact_mass(log_p: Tensor, kept: Tensor, top_p: Tensor) -> Tensor:
    """Log weights of sorted tokens [B, V]: those above the cutoff keep theirs, those tied at it share what is left.

    The cutoff is the probability at which the cumulative sum first reaches `top_p`.
    """
    p = log_p.exp()
    reached = (p.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    cutoff = log_p.gather(-1, reached)
    above, tied = kept & (log_p > cutoff), kept & (log_p == cutoff)
    left = top_p - torch.where(above, p, 0.0).sum(dim=-1, keepdim=True)  # below 0 by rounding alone
    share = (left / tied.sum(dim=-1, keepdim=True).clamp(min=1)).clamp(min=0.0).log()
    return torch.where(above, log_p, torch.where(tied, share, -torch.inf))


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Nucleus()]

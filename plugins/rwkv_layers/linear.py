"""Matrix products in the form that the processor at hand does best.

F.linear has oneDNN copy bfloat16 weights into another layout for each product. As the left operand they are read as
they lie. With AMX that is 1.2 to 1.65 times as fast for up to a hundred rows, and at one row by `mv` 1.3 to 1.9
times. Without AMX (measured on AVX512-BF16) `mv` is half as fast as F.linear, fewer than 32 rows gain nothing sure,
32 to 64 rows 1.05 to 1.15 times. float32 and float16 gain nothing. Annotations here are real types, not strings:
torch.jit.script reads them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def one() -> int:
    return 1


def thirty_two() -> int:
    return 32


fewest = one if torch.cpu._is_amx_tile_supported() else thirty_two
"""Fewest rows for which the weights go to the left. A function: torch.jit.script takes no numbers from outside."""


def left(x: Tensor, rows: int) -> bool:
    """Whether the weights go to the left of so many rows."""
    return x.dtype == torch.bfloat16 and x.is_cpu and fewest() <= rows and rows <= 64


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear without a bias: x [..., C], weight [D, C] -> [..., D]."""
    C = weight.shape[1]
    if not left(x, x.numel() // C):
        return F.linear(x, weight)
    if x.numel() == C:
        return torch.mv(weight, x.reshape(C)).view(x.shape[:-1] + weight.shape[:1])
    return torch.mm(weight, x.reshape(-1, C).t()).t().contiguous().view(x.shape[:-1] + weight.shape[:1])


def linears(x: Tensor, weight: Tensor) -> Tensor:
    """Several products at once, which oneDNN starts once: x [n, M, C], weight [n, D, C] -> [n, M, D]."""
    if left(x, x.shape[1]):
        return torch.bmm(weight, x.transpose(1, 2)).transpose(1, 2).contiguous()
    return torch.bmm(x, weight.transpose(1, 2))


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight [D, C], x [C, M] -> [D, M]: for chains of products, which need not be turned round after each."""
    M = x.shape[1]
    if M == 1 and left(x, M):
        return torch.mv(weight, x.reshape(-1)).unsqueeze(1)
    if x.dtype == torch.bfloat16 and x.is_cpu and fewest() > M:
        return F.linear(x.t(), weight).t()
    return torch.mm(weight, x)

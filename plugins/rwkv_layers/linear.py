"""Matrix products in the form that the processor at hand does best.

F.linear has oneDNN copy bfloat16 weights into another layout for each product. As the left operand they are read as
they lie. With AMX that is 1.2 to 1.65 times as fast for up to a hundred rows, and at one row by `mv` 1.3 to 1.9
times. Without AMX (measured on AVX512-BF16) `mv` is half as fast as F.linear, fewer than 32 rows gain nothing sure,
32 to 64 rows 1.05 to 1.15 times. float32 and float16 gain nothing. Annotations here are real types, not strings:
torch.jit.script reads them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Matrix(NamedTuple):
    """A large weight, dense or quantized: then row d is weight[d] * scale[d], the weight from -127 to 127."""

    weight: Tensor  # [D, C], or [n, D, C] of several; int8 where quantized
    scale: Tensor | None  # [D] or [n, D] float32, each a number that bfloat16 has too; None where dense


def with_amx() -> int:
    """Fewest rows for which the weights go to the left. A function: torch.jit.script knows no numbers of a module."""
    return 1


def without_amx() -> int:
    return 32


fewest = with_amx if torch.cpu._is_amx_tile_supported() else without_amx


def left(x: Tensor, rows: int) -> bool:
    """Whether the weights go to the left of so many rows."""
    return x.dtype == torch.bfloat16 and x.is_cpu and fewest() <= rows and rows <= 64


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x [..., C], matrix [D, C] -> [..., D]."""
    scale = matrix.scale
    if scale is None:
        return dense(x, matrix.weight)
    rows = quantized(x.reshape(-1, x.shape[-1]), matrix.weight, scale)
    return rows.view(x.shape[:-1] + scale.shape)


def linears(x: Tensor, matrices: Matrix) -> Tensor:
    """Several products at once, which oneDNN starts once: x [n, M, C], matrices [n, D, C] -> [n, M, D]."""
    weight, scale = matrices.weight, matrices.scale
    if scale is not None:
        return torch.stack([quantized(x[i], weight[i], scale[i]) for i in range(x.shape[0])])
    if left(x, x.shape[1]):
        return torch.bmm(weight, x.transpose(1, 2)).transpose(1, 2).contiguous()
    return torch.bmm(x, weight.transpose(1, 2))


def times(matrix: Matrix, x: Tensor) -> Tensor:
    """matrix [D, C], x [C, M] -> [D, M]: for chains of products, which need not be turned round after each."""
    weight, scale, M = matrix.weight, matrix.scale, x.shape[1]
    if scale is not None:
        return quantized(x.t(), weight, scale).t()
    if M == 1 and left(x, M):
        return torch.mv(weight, x.reshape(-1)).unsqueeze(1)
    if x.dtype == torch.bfloat16 and x.is_cpu and fewest() > M:
        return F.linear(x.t(), weight).t()
    return torch.mm(weight, x)


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear without a bias: x [..., C], weight [D, C] -> [..., D]."""
    C = weight.shape[1]
    if not left(x, x.numel() // C):
        return F.linear(x, weight)
    if x.numel() == C:
        return torch.mv(weight, x.reshape(C)).view(x.shape[:-1] + weight.shape[:1])
    return torch.mm(weight, x.reshape(-1, C).t()).t().contiguous().view(x.shape[:-1] + weight.shape[:1])


def quantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, C], weight int8 [D, C], scale [D] -> [M, D].

    torch's own kernel for few rows of bfloat16 reads the weights as they are; past eight rows it is slower than
    widening them first, and it needs a whole number of 16 columns. For float32 and float16 it is 10 times as slow.
    """
    if x.dtype == torch.bfloat16 and x.is_cpu and x.shape[0] <= 8 and x.shape[1] % 16 == 0:
        # The kernel wants both as they lie in memory, which torch.compile takes no other way to have written.
        scale = scale.to(x.dtype).as_strided(scale.shape, [1])
        x = x.contiguous().as_strided(x.shape, [x.shape[1], 1])
        return torch._weight_int8pack_mm(x, weight, scale)
    if x.dtype == torch.float16:  # which does not hold sums of products with 127
        return F.linear(x, (weight * scale.unsqueeze(1)).to(x.dtype))
    return F.linear(x, weight.to(x.dtype)).mul_(scale.to(x.dtype))

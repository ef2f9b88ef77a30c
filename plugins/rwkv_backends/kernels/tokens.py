"""Between the matrix products of a prompt: gate, norm and token shift of some tokens that follow each other.

A program holds a few rows of C channels and the one before them: each is gated and normed once more in a few than once.
M = B T rows; row m is token m % T of sequence m // T. Annotations are real types, not strings: Triton reads them.
"""

# Tuples grow by addition, since Triton does not unpack; mypy would have each keep its length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rwkv_backends.kernels.device import let_next_begin, load_vector, sigmoid, store, tokens_there, wait_for_earlier
from rwkv_backends.kernels.mixing import across, embed
from rwkv_backends.kernels.sizes import cdiv
from rwkv_backends.kernels.tuning import Tuning

REGISTERS = 80
WIDE_REGISTERS = 128
"""Of a thread, in 16 bits, and where rows are wider than 2048: three programs share a multiprocessor, or two."""


@triton.jit
def rows_from(ptr, start, M, cols, C: tl.constexpr, TOKENS: tl.constexpr):
    """The row before `start` and those from it on, as they are stored; those that do not exist are zero."""
    rows = ()
    for j in tl.static_range(TOKENS + 1):
        m = start + j - 1
        rows = rows + (tl.load(ptr + m * C + cols, mask=cols < tl.where((m >= 0) & (m < M), C, 0), other=0.0),)
    return rows


@triton.jit
def gated(x, r, v, scale):
    y = ()
    for j in tl.static_range(len(x)):
        whole = x[j].to(tl.float32) + sigmoid(r[j].to(tl.float32)) * v[j].to(tl.float32)
        y = y + ((whole * scale).to(x[j].dtype),)
    return y


@triton.jit
def plus3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def plus5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def totals(rows):
    """The sums of three or five rows, for which the warps of a program meet once."""
    return tl.reduce(rows, 0, plus3 if len(rows) == 3 else plus5)


@triton.jit
def normed(x, weight, bias, mask, C: tl.constexpr):
    """Layer norm of each row, rounded as the state holds it."""
    wide = ()
    for j in tl.static_range(len(x)):
        wide = wide + (x[j].to(tl.float32),)
    sums = totals(wide)
    apart = ()
    squares = ()
    for j in tl.static_range(len(x)):
        apart = apart + (tl.where(mask, wide[j] - sums[j] / C, 0.0),)
        squares = squares + (apart[j] * apart[j],)
    sums = totals(squares)
    y = ()
    for j in tl.static_range(len(x)):
        y = y + ((apart[j] * tl.rsqrt(sums[j] / C + 1e-5) * weight + bias).to(x[j].dtype),)
    return y


@triton.jit(do_not_specialize=["M", "T"])
def tokens_kernel(x_ptr, r_ptr, v_ptr, gated_ptr, scale, prev_ptr, weight_ptr, bias_ptr, maa_ptrs, out_ptrs, last_ptr,
                  length_ptr, M, T, C: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """Without v, x is not gated; without weight, it is not normed and shifted; without maa, out is what is shifted."""
    let_next_begin(OVERLAP)
    start = tl.program_id(0).to(tl.int64) * TOKENS
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    if weight_ptr is not None:  # once for all tokens: what is read after something is written waits for memory again
        weight, bias = load_vector(weight_ptr, cols, mask), load_vector(bias_ptr, cols, mask)
    wait_for_earlier(OVERLAP)
    x = rows_from(x_ptr, start, M, cols, C, TOKENS)
    if v_ptr is not None:
        r = rows_from(r_ptr, start, M, cols, C, TOKENS)
        v = rows_from(v_ptr, start, M, cols, C, TOKENS)
        x = gated(x, r, v, scale)
        for j in tl.static_range(TOKENS):
            at = gated_ptr + (start + j) * C + cols
            tl.store(at, x[j + 1], mask=cols < tl.where(start + j < M, C, 0))
    if weight_ptr is not None:
        y = normed(x, weight, bias, mask, C)
        count = tokens_there(length_ptr, T)
        for j in tl.static_range(TOKENS):
            m = start + j
            b = m.to(tl.int32) // T  # whole numbers of 64 bits take long to divide
            t = m.to(tl.int32) - b * T
            there = cols < tl.where(m < M, C, 0)
            before = y[j]
            if t == 0:
                before = tl.load(prev_ptr + b * C + cols, mask=there, other=0.0)
            here = y[j + 1].to(tl.float32)
            dx = before.to(tl.float32) - here
            for i in tl.static_range(len(out_ptrs)):
                if maa_ptrs[i] is None:
                    tl.store(out_ptrs[i] + m * C + cols, y[j + 1], mask=there)
                else:
                    store(out_ptrs[i] + m * C + cols, here + dx * load_vector(maa_ptrs[i], cols, mask), there)
            ends = (m < M) & (t == count - 1)
            tl.store(last_ptr + b * C + cols, y[j + 1], mask=cols < tl.where(ends, C, 0))


class Shift(NamedTuple):
    """A norm and the token shift after it."""

    prev: Tensor  # [B, C]: what the first tokens are shifted from
    norm: tuple[Tensor, Tensor]
    maa: tuple[Tensor | None, ...]  # None for what is shifted itself
    last: Tensor  # [B, C]: where the last tokens are left for what follows
    length: Tensor | None = None  # see `Padded`


def shift(x: Tensor, to: Shift, tuning: Tuning) -> Tensor:
    """x [M, C] -> LN(x) + dx maa for each of these n, [n, M, C], dx being what the token before leaves, minus LN(x)."""
    out = x.new_empty(len(to.maa), *x.shape)
    _start(x, None, None, None, 1.0, to, out, tuning)
    return out


def gate(r: Tensor, v: Tensor, x: Tensor, scale: float, tuning: Tuning) -> Tensor:
    """(x + sigmoid(r) v) scale, all [M, C]."""
    out = torch.empty_like(x)
    _start(x, r, v, out, scale, None, None, tuning)
    return out


def gate_shift(r: Tensor, v: Tensor, x: Tensor, scale: float, to: Shift, tuning: Tuning) -> tuple[Tensor, Tensor]:
    """`gate`, and `shift` of what it gives."""
    gated, out = torch.empty_like(x), x.new_empty(len(to.maa), *x.shape)
    _start(x, r, v, gated, scale, to, out, tuning)
    return gated, out


def _start(
    x: Tensor,
    r: Tensor | None,
    v: Tensor | None,
    gated: Tensor | None,
    scale: float,
    to: Shift | None,
    out: Tensor | None,
    tuning: Tuning,
) -> None:
    M, C = x.shape
    prev, norm, maa, last, length = to or (None, (None, None), None, None, None)
    T = M // len(prev) if prev is not None else M
    options, tokens = across(C), tuning.tokens
    registers = REGISTERS
    if options["BLOCK"] > 2048:  # as many numbers a thread with fewer rows
        tokens, registers = 2, WIDE_REGISTERS
    tokens_kernel[cdiv(M, tokens),](
        x, r, v, gated, scale, prev, *norm, maa, None if out is None else out.unbind(0), last, length, M, T,
        **options, TOKENS=tokens, maxnreg=registers if x.element_size() == 2 else None, **tuning.launch,
    )  # fmt: skip


def last_normed(x: Tensor, norm: tuple[Tensor, Tensor], every: bool, length: Tensor | None, tuning: Tuning) -> Tensor:
    """x [B, T, C] -> LN of the last token of each sequence [B, C], or of `every` one. `length`: see `Padded`."""
    if length is not None and not every:
        return embed(length - 1, x[0], norm, tuning)
    return F.layer_norm(x if every else x[:, -1], x.shape[-1:], *norm)

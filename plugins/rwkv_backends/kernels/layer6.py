"""A layer of RWKV-6 for one token of one row as one kernel, whose programs meet between its stages.

The stages are those of `vector` and `wkv6`. Between kernels a GPU waits for the last program, then starts the next;
here programs that have done their share ask for their first weights of the next stage and wait for a counter. All
programs must run at once, or those that wait would keep out those they wait for. What one program writes and another
reads goes by way of the L2 cache (".cg"), which all of them share.
Annotations are real types, not strings: Triton reads them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rwkv_layers.linear import Matrix
from rwkv_layers.rwkv6 import Block
from torch import Tensor

from rwkv_backends.kernels.device import (
    let_next_begin,
    load_fresh,
    load_raw,
    load_vector,
    norm_with,
    store,
    tanh,
    wait_for_earlier,
)
from rwkv_backends.kernels.tuning import Tuning
from rwkv_backends.kernels.vector import first_tiles, products, share, value_tile

STAGES = 7
COUNTERS = 8
"""Of a layer: how many programs have arrived in each stage."""
WARPS, REGISTERS = 16, 128
"""Warps that a multiprocessor runs at once, and registers of a thread: with 32 threads a warp these are all the 65536
registers that it has."""


@triton.jit
def arrive(counters, stage: tl.constexpr, MEET: tl.constexpr):
    """This program has written what it had to in a stage."""
    if MEET:
        tl.debug_barrier()
        tl.atomic_add(counters + stage, 1, sem="release")


@triton.jit
def meet(counters, stage: tl.constexpr, goal, MEET: tl.constexpr):
    """Until so many programs have arrived; what they wrote can be read then, by way of the L2 cache."""
    if MEET:
        seen = arrived(counters + stage)
        while seen < goal:
            seen = arrived(counters + stage)


@triton.jit
def arrived(counter):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def adapter(p, P, x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptr, w_ptr, normed_ptr, dx_ptr, lora_ptr, counters, others,
            cols, mask, D, C: tl.constexpr, ROWS: tl.constexpr, MEET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Norm, token shift and the mixtures' first adapter, D rows of it."""
    tiles = tl.cdiv(D, ROWS)
    programs = tl.minimum(P, tiles)
    begin, stop = share(tl.minimum(p, programs), programs, tiles)
    stop = tl.minimum(stop, tiles)
    w, ahead = first_tiles(w_ptr, begin, stop, D, cols, mask, C, ROWS)
    weight, bias = load_raw(weight_ptr, cols, mask), load_raw(bias_ptr, cols, mask)
    maa, prev = load_raw(maa_ptr, cols, mask), load_raw(prev_ptr, cols, mask)
    wait_for_earlier(OVERLAP)
    if p == 0:
        tl.store(others + tl.arange(0, 8), tl.zeros((8,), tl.int32))
    if p < programs:
        x = norm_with(x_ptr, weight, bias, cols, mask, C)
        dx = prev.to(tl.float32) - x
        if p == 0:
            store(normed_ptr + cols, x, mask)
            store(dx_ptr + cols, dx, mask)
        x += dx * maa.to(tl.float32)
        products(x, w, ahead, w_ptr, None, 0, lora_ptr, begin, stop, D, cols, mask, C, ROWS, "")
        arrive(counters, 0, MEET)


@triton.jit
def mixtures(p, P, lora_ptr, normed_ptr, dx_ptr, w_ptr, mixed_ptr, prev_ptr, counters, C: tl.constexpr,
             R: tl.constexpr, RANK: tl.constexpr, LERP: tl.constexpr, ROWS: tl.constexpr,
             MEET: tl.constexpr):  # fmt: skip
    """The five of them, for some channels a program."""
    blocks = tl.cdiv(C, LERP)
    mixture = p // blocks
    cols = p % blocks * LERP + tl.arange(0, LERP)
    mask = (cols < C) & (mixture < 5)
    rank = tl.arange(0, RANK)
    w_ptr += mixture * (R + 1) * C
    w_mask = (rank < R)[:, None] & mask[None, :]
    w = tl.load(w_ptr + rank[:, None] * C + cols[None, :], mask=w_mask, other=0.0)
    maa = load_raw(w_ptr + R * C, cols, mask)
    if mixture < 5:
        meet(counters, 0, tl.minimum(P, tl.cdiv(5 * R, ROWS)), MEET)
        low = tanh(load_fresh(lora_ptr + mixture * R, rank, rank < R))
        x, dx = load_fresh(normed_ptr, cols, mask), load_fresh(dx_ptr, cols, mask)
        mix = tl.sum(low[:, None] * w.to(tl.float32), 0) + maa.to(tl.float32)
        store(mixed_ptr + mixture * C + cols, x + dx * mix, mask)
        if mixture == 0:
            store(prev_ptr + cols, x, mask)
        arrive(counters, 1, MEET)


@triton.jit
def key_value_receptance_gate(p, P, PER, mixed_ptr, w_ptr, scale_ptr, low_w_ptr, out_ptr, low_ptr, counters, D, cols,
                              mask, C: tl.constexpr, LERP: tl.constexpr, ROWS: tl.constexpr,
                              MEET: tl.constexpr):  # fmt: skip
    """PER programs each; the others take the decay's first adapter, D rows of it."""
    part = p // PER
    goal = 5 * tl.cdiv(C, LERP)
    if part < 4:
        own = w_ptr + part * C * C
        begin, stop = share(p - part * PER, PER, tl.cdiv(C, ROWS))
        w, ahead = first_tiles(own, begin, stop, C, cols, mask, C, ROWS)
        meet(counters, 1, goal, MEET)
        x = load_fresh(mixed_ptr + (part + 1) * C, cols, mask)
        out_at = out_ptr + part * C
        products(x, w, ahead, own, scale_ptr, part * C, out_at, begin, stop, C, cols, mask, C, ROWS, "")
    else:
        begin, stop = share(p - 4 * PER, P - 4 * PER, tl.cdiv(D, ROWS))
        low, low_ahead = first_tiles(low_w_ptr, begin, stop, D, cols, mask, C, ROWS)
        meet(counters, 1, goal, MEET)
        x = load_fresh(mixed_ptr, cols, mask)
        products(x, low, low_ahead, low_w_ptr, None, 0, low_ptr, begin, stop, D, cols, mask, C, ROWS, "")
    arrive(counters, 2, MEET)


@triton.jit
def wkv(p, P, kvrg_ptr, low_ptr, w_ptr, decay_ptr, bonus_ptr, weight_ptr, bias_ptr, kv_ptr, out_ptr, counters, D,
        C: tl.constexpr, N: tl.constexpr, LOW: tl.constexpr, MEET: tl.constexpr):  # fmt: skip
    """Head p, its norm and gate: see wkv6.wkv_kernel."""
    n = tl.arange(0, N)
    own = p * N + n
    at = kv_ptr + p * N * N + n[:, None] * N + n[None, :]
    s = tl.load(at)  # [K, V]
    rank = tl.arange(0, LOW)
    w = tl.load(w_ptr + own[:, None] * D + rank[None, :], mask=(rank < D)[None, :], other=0.0)
    base, u = tl.load(decay_ptr + own), tl.load(bonus_ptr + own)
    weight, bias = tl.load(weight_ptr + own), tl.load(bias_ptr + own)
    meet(counters, 2, P, MEET)
    low = tanh(load_fresh(low_ptr, rank, rank < D))
    decay = tl.exp(-tl.exp(base + tl.sum(w.to(tl.float32) * low[None, :], 1)))
    k, v = load_fresh(kvrg_ptr, own, n < N), load_fresh(kvrg_ptr + C, own, n < N)
    r, g = load_fresh(kvrg_ptr + 2 * C, own, n < N), load_fresh(kvrg_ptr + 3 * C, own, n < N)
    o = tl.sum(s * r[:, None], 0) + tl.sum(r * u * k, 0) * v
    tl.store(at, s * decay[:, None] + k[:, None] * v[None, :])
    apart = o - tl.sum(o, 0) / N
    y = apart * tl.rsqrt(tl.sum(apart * apart, 0) / N + 64e-5)
    store(out_ptr + own, (y * weight + bias) * g * tl.sigmoid(g), n < N)
    arrive(counters, 3, MEET)


@triton.jit
def output(p, P, y_ptr, w_ptr, scale_ptr, x_ptr, counters, cols, mask, C: tl.constexpr, N: tl.constexpr,
           ROWS: tl.constexpr, MEET: tl.constexpr):  # fmt: skip
    """x += W y."""
    begin, stop = share(p, P, tl.cdiv(C, ROWS))
    w, ahead = first_tiles(w_ptr, begin, stop, C, cols, mask, C, ROWS)
    meet(counters, 3, C // N, MEET)
    y = load_fresh(y_ptr, cols, mask)
    products(y, w, ahead, w_ptr, scale_ptr, 0, x_ptr, begin, stop, C, cols, mask, C, ROWS, "add")
    arrive(counters, 4, MEET)


@triton.jit
def inner(p, programs, P, x_ptr, prev_ptr, weight_ptr, bias_ptr, maa_ptr, w_ptr, scale_ptr, normed_ptr, out_ptr,
          counters, D, keep, cols, mask, C: tl.constexpr, ROWS: tl.constexpr, THEN: tl.constexpr,
          MEET: tl.constexpr):  # fmt: skip
    """Key or receptance of the channel mixing, D rows of them among so many programs."""
    begin, stop = share(p, programs, tl.cdiv(D, ROWS))
    w, ahead = first_tiles(w_ptr, begin, stop, D, cols, mask, C, ROWS)
    weight, bias = load_raw(weight_ptr, cols, mask), load_raw(bias_ptr, cols, mask)
    maa, prev = load_raw(maa_ptr, cols, mask), load_raw(prev_ptr, cols, mask)
    meet(counters, 4, P, MEET)
    x = norm_with(x_ptr, weight, bias, cols, mask, C)
    if keep:
        store(normed_ptr + cols, x, mask)
    x += (prev.to(tl.float32) - x) * maa.to(tl.float32)
    products(x, w, ahead, w_ptr, scale_ptr, 0, out_ptr, begin, stop, D, cols, mask, C, ROWS, THEN)
    arrive(counters, 5, MEET)


@triton.jit
def value(p, P, SPLITS, k_ptr, r_ptr, w_ptr, scale_ptr, normed_ptr, x_ptr, prev_ptr, parts_ptr, arrived_ptr, counters,
          scale, C: tl.constexpr, F: tl.constexpr, TALL: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
          MEET: tl.constexpr):  # fmt: skip
    """The value matrix, whose rows of zero inputs are skipped: see vector.value_kernel."""
    blocks = tl.cdiv(C, COLS)
    block, split = p % blocks, p // blocks
    cols = block * COLS + tl.arange(0, COLS)
    mask = cols < C
    begin, stop = share(split, SPLITS, tl.cdiv(F, TALL))
    end = tl.minimum(stop * TALL, F)
    rows = begin * TALL + tl.arange(0, TALL)
    meet(counters, 5, P, MEET)
    k, k_ahead = load_fresh(k_ptr, rows, rows < end), load_fresh(k_ptr, rows + TALL, rows + TALL < end)
    w = value_tile(w_ptr, k, rows, cols, mask, C)
    total = tl.zeros((TALL, COLS), tl.float32)
    for _ in range(begin, stop):
        rows += TALL
        ahead = value_tile(w_ptr, k_ahead, rows, cols, mask, C)
        k_later = load_fresh(k_ptr, rows + TALL, rows + TALL < end)
        total += w.to(tl.float32) * k[:, None]
        w = ahead
        k = k_ahead
        k_ahead = k_later
    tl.store(parts_ptr + split * C + cols, tl.sum(total, 0), mask=mask)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived_ptr + block, 0)
        splits = tl.arange(0, WIDE)
        parts_at = parts_ptr + splits[:, None] * C + cols[None, :]
        parts_mask = (splits < SPLITS)[:, None] & mask[None, :]
        y = tl.sum(tl.load(parts_at, mask=parts_mask, other=0.0, cache_modifier=".cg"), 0)
        if scale_ptr is not None:
            y *= load_vector(scale_ptr, cols, mask)
        y *= load_fresh(r_ptr, cols, mask)
        store(x_ptr + cols, (load_fresh(x_ptr, cols, mask) + y) * scale, mask)
        store(prev_ptr + cols, load_fresh(normed_ptr, cols, mask), mask)


@triton.jit
def layer_kernel(
    x_ptr, att_prev, kv_ptr, ffn_prev, ln1_weight, ln1_bias, maa_x, maa_w1, maa_w2, kvrg_w, kvrg_scale, decay_w1,
    decay_w2, decay_ptr, bonus_ptr, lnx_weight, lnx_bias, output_w, output_scale, ln2_weight, ln2_bias, maa_k, maa_r,
    key_w, key_scale, receptance_w, receptance_scale, value_w, value_scale, normed_ptr, dx_ptr, lora_ptr, mixed_ptr,
    kvrg_ptr, low_ptr, out_ptr, normed2_ptr, k_ptr, r_ptr, parts_ptr, arrived_ptr, counters, others, scale, D, PER,
    KEYS, SPLITS, C: tl.constexpr, F: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, LERP: tl.constexpr, TALL: tl.constexpr,
    COLS: tl.constexpr, WIDE: tl.constexpr, STAGE: tl.constexpr, MEET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All stages (STAGE -1), or one for a test; `others` are the counters of the layer before, done with."""
    let_next_begin(OVERLAP)
    p, P = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    if STAGE == -1 or STAGE == 0:
        adapter(p, P, x_ptr, att_prev, ln1_weight, ln1_bias, maa_x, maa_w1, normed_ptr, dx_ptr, lora_ptr, counters,
                others, cols, mask, 5 * R, C, ROWS, MEET, OVERLAP)  # fmt: skip
    if STAGE == -1 or STAGE == 1:
        mixtures(p, P, lora_ptr, normed_ptr, dx_ptr, maa_w2, mixed_ptr, att_prev, counters, C, R, RANK, LERP, ROWS,
                 MEET)  # fmt: skip
    if STAGE == -1 or STAGE == 2:
        key_value_receptance_gate(p, P, PER, mixed_ptr, kvrg_w, kvrg_scale, decay_w1, kvrg_ptr, low_ptr, counters, D,
                                  cols, mask, C, LERP, ROWS, MEET)  # fmt: skip
    if (STAGE == -1 or STAGE == 3) and p < C // N:
        wkv(p, P, kvrg_ptr, low_ptr, decay_w2, decay_ptr, bonus_ptr, lnx_weight, lnx_bias, kv_ptr, out_ptr, counters,
            D, C, N, LOW, MEET)  # fmt: skip
    if STAGE == -1 or STAGE == 4:
        output(p, P, out_ptr, output_w, output_scale, x_ptr, counters, cols, mask, C, N, ROWS, MEET)
    if STAGE == -1 or STAGE == 5:
        if p < KEYS:
            inner(p, KEYS, P, x_ptr, ffn_prev, ln2_weight, ln2_bias, maa_k, key_w, key_scale, normed2_ptr, k_ptr,
                  counters, F, p == 0, cols, mask, C, ROWS, "relu squared", MEET)  # fmt: skip
        else:
            inner(p - KEYS, P - KEYS, P, x_ptr, ffn_prev, ln2_weight, ln2_bias, maa_r, receptance_w, receptance_scale,
                  normed2_ptr, r_ptr, counters, C, False, cols, mask, C, ROWS, "sigmoid", MEET)  # fmt: skip
    if (STAGE == -1 or STAGE == 6) and p < tl.cdiv(C, COLS) * SPLITS:
        value(p, P, SPLITS, k_ptr, r_ptr, value_w, value_scale, normed2_ptr, x_ptr, ffn_prev, parts_ptr, arrived_ptr,
              counters, scale, C, F, TALL, COLS, WIDE, MEET)  # fmt: skip


class Plan(NamedTuple):
    """How a layer is shared among programs."""

    programs: int
    warps: int
    channels: int  # of a program where the five mixtures are made

    @classmethod
    def of(cls, like: Tensor, C: int, H: int, tuning: Tuning) -> "Plan | None":
        """None where programs do not suffice for each stage, or registers for weights of the dtype of `like`."""
        warps = max(4, tuning.warps(C))
        programs = tuning.meeting * 4 // warps
        channels = max(16, triton.next_power_of_2(C) // 32)
        enough = programs >= max(H, 5 * int(triton.cdiv(C, channels)), 8)
        return cls(programs, warps, channels) if enough and like.element_size() <= 2 else None


class Scratch(NamedTuple):
    """What the stages of a layer leave each other; one for all layers."""

    normed: Tensor  # [C], as the next four of the dtype of the model
    dx: Tensor  # [C]
    mixed: Tensor  # [5, C]
    out: Tensor  # [C]
    normed2: Tensor  # [C]
    k: Tensor  # [F]
    lora: Tensor  # [5R], as all that follow float32
    kvrg: Tensor  # [4, C]
    low: Tensor  # [D]
    r: Tensor  # [C]
    parts: Tensor  # [splits, C]
    arrived: Tensor  # int32 [blocks of columns], zero between steps
    counters: Tensor  # int32 [L, COUNTERS]: zero for a layer that is yet to come


def scratch(like: Tensor, layers: int, C: int, F: int, R: int, D: int, plan: Plan, tuning: Tuning) -> Scratch:
    """For a model of these sizes, of the dtype and on the device of `like`."""
    blocks = int(triton.cdiv(C, min(tuning.value_cols, triton.next_power_of_2(C))))

    def full(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    def counts(*shape: int) -> Tensor:
        return like.new_zeros(shape, dtype=torch.int32)

    return Scratch(
        normed=like.new_empty(C),
        dx=like.new_empty(C),
        mixed=like.new_empty(5, C),
        out=like.new_empty(C),
        normed2=like.new_empty(C),
        k=like.new_empty(F),
        lora=full(5 * R),
        kvrg=full(4, C),
        low=full(D),
        r=full(C),
        parts=full(plan.programs // blocks + 1, C),
        arrived=counts(blocks),
        counters=counts(layers, COUNTERS),
    )


def run(x: Tensor, state: tuple[Tensor, Tensor, Tensor], block: Block, value_turned: Matrix, scale: float, i: int,
        work: Scratch, plan: Plan, tuning: Tuning, stage: int = -1) -> None:  # fmt: skip
    """One token through layer i: x [1, C] and its state (att_x_prev [1, C], att_kv [1, H, N, N], ffn_x_prev) in place.

    value_turned is [F, C]. A single stage does not wait for the one before it.
    """
    att, ffn = block.att, block.ffn
    (C,), F, R, D = x.shape[1:], ffn.key.weight.shape[0], att.maa_w2.shape[1] - 1, att.decay_w1.shape[0]
    N = att.bonus.shape[1]
    wide = triton.next_power_of_2(C)
    rows, programs = tuning.tile_rows, plan.programs
    lows = max(1, min(triton.cdiv(D, rows), programs // 40))
    per = (programs - lows) // 4
    tall, cols = min(tuning.value_rows, triton.next_power_of_2(F)), min(tuning.value_cols, wide)
    splits = max(1, min(triton.cdiv(F, tall), programs // triton.cdiv(C, cols)))
    meets = stage < 0
    options = {"num_warps": plan.warps, **tuning.launch, **({"maxnreg": REGISTERS} if meets else {})}
    layer_kernel[(programs,)](
        x, *state, *block.ln1, att.maa_x, att.maa_w1, att.maa_w2, *att.kvrg, att.decay_w1, att.decay_w2, att.decay,
        att.bonus, att.ln_x_weight, att.ln_x_bias, *att.output, *block.ln2, ffn.maa_k, ffn.maa_r, *ffn.key,
        *ffn.receptance, *value_turned, work.normed, work.dx, work.lora, work.mixed, work.kvrg, work.low, work.out,
        work.normed2, work.k, work.r, work.parts, work.arrived, work.counters[i], work.counters[i - 1], scale, D, per,
        programs * F // (F + C), splits, C, F, R, N, wide, triton.next_power_of_2(R), triton.next_power_of_2(D), rows,
        plan.channels, tall, cols, triton.next_power_of_2(splits), stage, meets, **options,
    )  # fmt: skip

"""A chunk of a prompt as one graph, with the graph's place taken by the kernels themselves: a GPU has its own test."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_backends.graphs import Graphs
from rwkv_backends.prompts import CapturedPrompts
from torch import Tensor

from rwkv_runtime import Model, Tick

LENGTH, HALF = 8, 4


class Played(Graphs):
    """Runs what it was to capture."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        self.captures += 1
        return tick


class Full(Graphs):
    """Has no memory left."""

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        raise RuntimeError("CUDA out of memory\nand much more")


def read(model: Model, graphs: Graphs) -> None:
    """Two whole chunks, two halves of one and a part, beside the plain forward pass."""
    plain = Eager().forward(model)
    forward = CapturedPrompts(plain, model, graphs, {LENGTH, HALF})
    ours, theirs = model.new_state(), model.new_state()
    sizes = [LENGTH, LENGTH, HALF, HALF, 3]
    for piece in torch.tensor([tokens_of(sum(sizes))]).split(sizes, dim=1):
        assert torch.equal(forward(piece, ours), plain(piece, theirs))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs.tensors)


def test_a_whole_chunk_goes_through_one_capture_and_leaves_the_state_it_must(model: Model) -> None:
    graphs = Played()
    read(model, graphs)
    assert graphs.captures == 2  # one for each length


def test_where_nothing_can_be_captured_prompts_are_read_all_the_same(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rwkv_runtime"):
        read(model, Full())
    [warning] = [record.message for record in caplog.records]
    assert warning == "prompts are read without a captured graph, which is slower: CUDA out of memory"


class Slow(Graphs):
    """Lets another thread in between what a replay reads and what it has written."""

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        def slowly() -> None:
            time.sleep(0.01)
            tick()
            time.sleep(0.01)

        return slowly


def test_threads_that_share_a_graph_take_turns(model: Model) -> None:
    plain = Eager().forward(model)
    forward = CapturedPrompts(plain, model, Slow(), {LENGTH})

    def last(first: int) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([tokens_of(LENGTH + first)[first:]])
        return forward(tokens, model.new_state()), plain(tokens, model.new_state())

    with ThreadPoolExecutor(4) as threads:
        for ours, theirs in threads.map(last, range(8)):
            assert torch.equal(ours, theirs)

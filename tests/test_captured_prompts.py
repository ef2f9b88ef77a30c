"""A chunk of a prompt as one graph, with the graph's place taken by the kernels themselves: a GPU has its own test."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import apart, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from rwkv_backends.eager import Eager
from rwkv_backends.graphs import Graphs
from rwkv_backends.prompts import LEAST_STEP, CapturedPrompts, Padded, size_of
from torch import Tensor

from rwkv_runtime import Forward, Model, State, Tick

LENGTH, HALF = 8, 4


class Played(Graphs):
    """Runs what it was to capture."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        self.captures += 1
        return tick


class Full(Graphs):
    """Has room for so many graphs, of which the first is refused, and no more."""

    def __init__(self, room: int = 0) -> None:
        self.room, self.asked = room, 0

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        self.asked += 1
        if self.asked == 1 or self.asked > 1 + self.room:
            raise RuntimeError("CUDA out of memory\nand much more")
        return tick


def padded(plain: Forward) -> Padded:
    """With tokens that are not there left out."""

    def forward(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        return plain(tokens if length is None else tokens[:, : int(length)], state, every)

    return forward


def read(model: Model, graphs: Graphs) -> None:
    """Two whole chunks, two halves of one and a part, beside the plain forward pass."""
    plain = Eager().forward(model)
    forward = CapturedPrompts(padded(plain), model, graphs, {LENGTH, HALF})
    ours, theirs = model.new_state(), model.new_state()
    sizes = [LENGTH, LENGTH, HALF, HALF, 3]
    for piece in torch.tensor([tokens_of(sum(sizes))]).split(sizes, dim=1):
        assert apart(forward(piece, ours), plain(piece, theirs)) < 1e-5
        assert all(apart(ours[name], theirs[name]) < 1e-5 for name in theirs.tensors)


def test_whole_chunks_go_through_a_graph_for_each_length_and_leave_the_state_they_must(model: Model) -> None:
    graphs = Played()
    read(model, graphs)
    assert graphs.captures == 2


def test_where_nothing_can_be_captured_prompts_are_read_all_the_same(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "rwkv_runtime"):
        read(model, Full())
    assert [record.message for record in caplog.records] == [
        f"{length} tokens at once are read without a captured graph, which is slower: CUDA out of memory"
        for length in (LENGTH, HALF)
    ]


def test_where_the_longest_cannot_be_captured_the_next_takes_its_place(model: Model) -> None:
    graphs, sizes, plain = Full(room=1), [], Eager().forward(model)

    def noted(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        sizes.append(tokens.shape[1])
        return plain(tokens, state, every)

    forward = CapturedPrompts(noted, model, graphs, {LENGTH, HALF})
    tokens, ours, theirs = torch.tensor([tokens_of(LENGTH)]), model.new_state(), model.new_state()
    for _ in range(2):
        assert apart(forward(tokens, ours), plain(tokens, theirs)) < 1e-5
    assert sizes == [HALF] * 4
    assert graphs.asked == 2


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
    forward = CapturedPrompts(padded(plain), model, Slow(), {LENGTH})

    def last(first: int) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([tokens_of(LENGTH + first)[first:]])
        return forward(tokens, model.new_state()), plain(tokens, model.new_state())

    with ThreadPoolExecutor(4) as threads:
        for ours, theirs in threads.map(last, range(8)):
            assert torch.equal(ours, theirs)


def test_short_prompts_are_filled_up_to_a_size_and_the_second_of_a_size_is_captured(model: Model) -> None:
    graphs, plain, sizes = Played(), Eager().forward(model), []

    def noted(tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor:
        sizes.append((tokens.shape[1], None if length is None else int(length)))
        return padded(plain)(tokens, state, every, length)

    forward = CapturedPrompts(noted, model, graphs, {64}, padded=50)
    lengths, captures = (33, 2, 40, 35, 1, 50, 3, 64, 48), []
    ours, theirs = model.new_state(), model.new_state()
    for length in lengths:
        tokens = torch.tensor([tokens_of(length, length)])
        assert torch.equal(forward(tokens, ours), plain(tokens, theirs))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs.tensors)
        captures.append(graphs.captures)
    expected = [(48, 33), (16, 2), (48, 40), (48, 35), (1, None), (50, None), (16, 3), (64, None), (48, 48)]
    assert sizes == expected
    assert captures == [0, 0, 1, 1, 1, 1, 2, 3, 3]
    forward(torch.tensor([tokens_of(9)]), ours, every=True)
    assert sizes[-1] == (9, None)


def test_what_is_filled_up_to_the_length_of_a_whole_chunk_has_a_graph_of_its_own(model: Model) -> None:
    graphs, plain = Played(), Eager().forward(model)
    forward = CapturedPrompts(padded(plain), model, graphs, {64}, padded=64)
    for length in (64, 60, 61, 64, 63):
        tokens, ours, theirs = torch.tensor([tokens_of(length)]), model.new_state(), model.new_state()
        assert torch.equal(forward(tokens, ours), plain(tokens, theirs))
    assert graphs.captures == 2


@given(st.integers(1, 1 << 20))
def test_a_size_holds_the_prompt_and_little_more(length: int) -> None:
    size = size_of(length)
    assert length <= size < length + max(LEAST_STEP, length / 4)
    assert size % LEAST_STEP == 0
    assert size_of(size) == size

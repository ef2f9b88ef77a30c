"""A decode step as a captured graph, whatever is in it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rwkv_backends.graphs import Graphs
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_a_capture_leaves_its_buffers_as_they_were() -> None:
    total = torch.ones(3, device="cuda")
    replay = Graphs().capture(lambda: total.add_(1), [total])
    assert total.tolist() == [1, 1, 1]
    replay()
    replay()
    assert total.tolist() == [3, 3, 3]


def test_another_thread_may_allocate_while_a_graph_is_captured() -> None:
    """A chunk of a prompt is captured when the first one comes, whatever other threads do then."""
    ended = threading.Event()

    def allocate() -> int:
        kept: list[Tensor] = []
        while not ended.is_set() and len(kept) < 2000:
            kept.append(torch.empty((3 << 20) + 4096 * len(kept), dtype=torch.uint8, device="cuda"))
            time.sleep(1e-4)
        return len(kept)

    total = torch.ones(1 << 20, device="cuda")

    def slow() -> None:
        for _ in range(50):
            total.add_(1)
            time.sleep(1e-3)

    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(allocate)
        replay = Graphs().capture(slow, [total])
        ended.set()
        assert other.result() > 50
    replay()
    assert total[0].item() == 51

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


def test_what_waits_for_the_device_is_refused_and_the_next_is_captured() -> None:
    """In the middle of what it does: what was captured of it goes."""
    graphs, total, seen = Graphs(), torch.ones(3, device="cuda"), list[float]()

    def waits() -> None:
        total.mul_(2)
        seen.append(total.sum().item())

    kept = graphs.capture(lambda: total.add_(1), [total])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="synchroni"):
            graphs.capture(waits, [total])
        assert total.tolist() == [1, 1, 1]  # and to wait is allowed again
    replay = graphs.capture(lambda: total.mul_(5), [total])
    replay()
    kept()
    assert total.tolist() == [6, 6, 6]


def test_what_waits_only_the_first_time_is_captured() -> None:
    """As who makes a table when it is first needed."""
    tables: list[Tensor] = []
    total = torch.ones(3, device="cuda")

    def tick() -> None:
        if not tables:
            tables.append(torch.tensor([1.0, 2.0, 3.0], device="cuda"))
        total.add_(tables[0])

    replay = Graphs().capture(tick, [total])
    replay()
    assert total.tolist() == [2, 3, 4]

"""A decode step as one CUDA graph: the host starts it once, not once a kernel."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rwkv_runtime import Tick


class Captured:
    """A graph, and the tick it was captured from: the graph reads and writes tensors that nothing else may hold."""

    def __init__(self, graph: torch.cuda.CUDAGraph, tick: Tick) -> None:
        self.graph, self.tick = graph, tick

    def __call__(self) -> None:
        self.graph.replay()


class Graphs:
    """Captures decode steps; their temporary memory is one pool, since no two of them run at once.

    A pool is shared only with a graph that is still there: one whose graphs are all gone may be held by what a library
    allocated in it, and refuses another capture.

    Captures take turns in a process, for what PyTorch refuses meanwhile it refuses to all threads: to allocate and to
    start kernels they are free, but not to wait for the device.

    A tick may leave results in its buffers alone: what it allocates is used again by the next graph. All replays go
    through the stream that is current, so those of one thread, or of several on the default stream, never overlap.
    """

    _turn = threading.Lock()

    def __init__(self) -> None:
        self._latest: WeakValueDictionary[torch.device, Captured] = WeakValueDictionary()

    def capture(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        """The tick as a graph, `buffers` (at least one, all on one device) as they were.

        Raises RuntimeError where the tick waits for the device or does something else that a graph cannot hold.
        """
        device = buffers[0].device
        with self._turn, torch.cuda.device(device):
            latest = self._latest.get(device)
            pool = latest.graph.pool() if latest else None
            saved = [buffer.clone() for buffer in buffers]
            try:
                _warm_up(tick)
                graph = torch.cuda.CUDAGraph()
                # What other threads do is not part of it. One that fails to begin leaves its own stream current: the
                # outer one is set again.
                alone = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
                with torch.cuda.stream(torch.cuda.current_stream()), alone, _refusing_to_wait():
                    tick()
            finally:
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)
        captured = Captured(graph, tick)
        self._latest[device] = captured
        return captured


def _warm_up(tick: Tick) -> None:
    """Runs the tick on a stream of its own: libraries make their work spaces and kernels are loaded, which a capture
    forbids."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            tick()
    finally:
        current.wait_stream(side)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Inside, what would wait for the device is an error of PyTorch's.

    One of the device's would end the capture half-way, after which the process may be unable to begin another.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")  # not for users
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)

"""What the machine can do at best: every figure is held against these, measured in the same process.

Buffers hold ones, not zeros: systems map memory that was never written to one page of zeros, which stays in the cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_runtime.settings import DTYPES

REPEATS = 5
GIB = 1 << 30


@dataclass(frozen=True)
class Probe:
    """One thing to do, how much work it is, and what to divide by for the unit."""

    run: Callable[[], object]
    work: float
    unit: str
    scale: float = 1e9

    def rate(self, seconds: float) -> float:
        return self.work / seconds / self.scale


@dataclass
class Ceilings:
    """The rates of probes; one not yet run is run when its rate is first asked for.

    Of several rounds the median counts, as it does of what is held against it: on a shared machine the best round of
    few may be half as fast again as any that comes later.
    """

    device: torch.device
    smoke: bool
    rounds: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def probe(self, name: str) -> Probe:
        return PROBES[name](self)

    def record(self, name: str, probe: Probe, seconds: float) -> None:
        self.rounds.setdefault(name, []).append(probe.rate(seconds))
        self.units[name] = probe.unit

    def rate(self, name: str) -> float:
        if name not in self.rounds:
            probe = self.probe(name)
            for repeat in range(1 if self.smoke else REPEATS):
                if repeat == 0:
                    probe.run()  # the first touches the memory
                self.record(name, probe, clock(probe.run, self.device))
        return statistics.median(self.rounds[name])

    def read(self) -> float:
        """GB/s of the fastest way to read memory once."""
        return max(self.rate(name) for name in READS)

    def matmul(self, dtype: str) -> float:
        """TFLOP/s of a large square matrix product."""
        return self.rate(f"matmul {dtype}")

    @property
    def buffer_bytes(self) -> int:
        """Far larger than the cache, yet no more than an eighth of the memory."""
        if self.smoke:
            return 1 << 25
        if self.device.type == "cuda":
            return 4 * GIB
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(max(GIB, 3 * cache_bytes()), memory // 8)


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds one run takes, until the device is done."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes() -> int:
    """Size of the last-level cache of the first core, 0 where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def names(device: torch.device, dtypes: Sequence[str]) -> list[str]:
    """The probes that make sense: of matrix products those in the given dtypes, of which a processor may lack some."""
    left_out = {f"matmul {dtype}" for dtype in DTYPES if dtype not in dtypes}
    return [name for name in PROBES if name not in left_out and (name != "empty graph" or device.type == "cuda")]


def _copy(c: Ceilings) -> Probe:
    source = torch.ones(c.buffer_bytes // 2, dtype=torch.uint8, device=c.device)
    target = torch.empty_like(source)
    return Probe(lambda: target.copy_(source), 2 * source.numel(), "GB/s")


def _read_sum(c: Ceilings) -> Probe:
    source = torch.ones(c.buffer_bytes // 4, device=c.device)
    return Probe(source.sum, 4 * source.numel(), "GB/s")


def _read_max(c: Ceilings) -> Probe:
    source = torch.ones(c.buffer_bytes // 4, device=c.device)
    return Probe(source.max, 4 * source.numel(), "GB/s")


def _read_mv(c: Ceilings) -> Probe:
    columns = 2048
    matrix = torch.ones((c.buffer_bytes // 2 // columns, columns), dtype=torch.bfloat16, device=c.device)
    vector = torch.ones(columns, dtype=torch.bfloat16, device=c.device)
    return Probe(lambda: torch.mv(matrix, vector), 2 * matrix.numel(), "GB/s")


def _matmul(dtype: str) -> Callable[[Ceilings], Probe]:
    def probe(c: Ceilings) -> Probe:
        n = 256 if c.smoke else 8192 if c.device.type == "cuda" else 2048
        a, b = (torch.randn(n, n, device=c.device).to(DTYPES[dtype]) for _ in range(2))
        return Probe(lambda: a @ b, 2 * n**3, "TFLOP/s", 1e12)

    return probe


def _empty_graph(c: Ceilings) -> Probe:
    """Replays of a captured graph that does next to nothing: what a decode step costs before any work."""
    x = torch.zeros(1, device=c.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    return Probe(graph.replay, 1, "replays/ms", 1e3)


READS = ("read sum", "read max", "read mv")
"""Which of them reads fastest differs from machine to machine."""
PROBES: Mapping[str, Callable[[Ceilings], Probe]] = {
    "copy": _copy,
    "read sum": _read_sum,
    "read max": _read_max,
    "read mv": _read_mv,
    **{f"matmul {dtype}": _matmul(dtype) for dtype in DTYPES},
    "empty graph": _empty_graph,
}

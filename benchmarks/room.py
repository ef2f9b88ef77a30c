"""Memory: what is free is asked before anything large is made, so that a run skips what does not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch


class Unavailable(Exception):
    """What cannot take part here, with the reason."""


def free_bytes(device: torch.device) -> int:
    """What can be allocated now: what the system gives, and what torch holds but does not use."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require(needed: int, device: torch.device, what: str) -> None:
    """Raises Unavailable where memory is short; a twentieth is left to everything else."""
    free = free_bytes(device)
    if needed > 0.95 * free:
        raise Unavailable(f"{what} needs {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free")


def require_disk(needed: int, folder: Path) -> None:
    """Raises Unavailable where a file of this size does not fit."""
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise Unavailable(f"the checkpoint takes {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free")

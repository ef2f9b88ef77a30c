"""How the C library treats the memory that tensors give back."""

from __future__ import annotations

from functools import cache

import torch

LESSON = 31 << 20
"""Bytes of a block; glibc raises its limits only for blocks of up to 32 MiB."""


@cache
def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensors, instead of giving it back and asking for it anew.

    It gives back what is free at the end of its heap where that is more than twice the largest block ever freed. New
    memory costs a page fault every 4 KiB, which took two fifths of the time of a draw on a CPU and up to a fifth of a
    prompt's. One large block, freed and never touched, costs nothing and raises that limit; elsewhere than with glibc
    it does no harm.
    """
    torch.empty(LESSON, dtype=torch.uint8)

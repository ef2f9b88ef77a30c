"""Sizes that decide how fast the kernels are, never what they compute."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """The defaults are for an H100's 132 multiprocessors. All but the counts of rows and programs are powers of two."""

    vector_rows: int = 2
    """Up to this batch size a decode step takes the kernels that read each weight once a row and skip what is zero;
    beyond it cuBLAS, with the rest fused around it."""
    programs: int = 528
    """About how many programs share the rows of a large matrix: four for each multiprocessor."""
    tile_rows: int = 4
    """Rows of a matrix that a program holds at once, each from end to end."""
    value_rows: int = 2048
    """Inputs of the value matrix that a program looks at together; those that are zero are not read."""
    value_cols: int = 16
    """Its outputs: one program each so many."""
    lerp_rows: int = 64
    """Most tokens of one program that mixes inputs."""
    lerp_cols: int = 64
    """Its channels."""
    chunk: int = 16
    """Tokens of a prompt between two states that are computed: at least 16, as a matrix product of Triton has."""
    state_cols: int = 32
    """Columns of a head's state that one program carries through a prompt: from 16 to the head size."""

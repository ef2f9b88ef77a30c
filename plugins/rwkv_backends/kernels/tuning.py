"""Sizes that decide how fast the kernels are, never what they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tuning:
    """The defaults are for an H100's 132 multiprocessors. All but the counts of rows and programs are powers of two."""

    vector_rows: int = 2
    """Up to this batch size a decode step takes the kernels that read each weight once a row and skip what is zero."""
    skinny_rows: int = 64
    """RWKV-6 in 16 bits: up to this batch size products are of our own; beyond it cuBLAS, with the rest fused around
    it."""
    skinny_cols: int = 128
    """Columns of a matrix that a program of such a product takes at a time, of few rows in 8 bits twice as many."""
    skinny_stages: int = 4
    """How many such it has asked for, or is about to multiply."""
    skinny_cached: int = 128
    """Columns that it has brought into the cache before it waits for the kernel ahead of it."""
    overlap: bool = True
    """Whether a kernel starts, and asks for its first weights, while the one before it still runs (programmatic
    dependent launch); the backend turns it off where the GPU cannot."""
    programs: int = 528
    """About how many programs share the rows of a large matrix: four for each multiprocessor, half as many where a
    program is twice as large."""
    tile_rows: int = 2
    """Rows of a matrix that a program holds at once, each from end to end."""
    ahead: int = 5
    """Such tiles that a program asks for at a time, before the kernel ahead of it has ended, where it has nothing else
    to hold but a vector."""
    together: int = 8
    """Tiles whose sums are one meeting of a program's threads: 1, 2, 4 or 8."""
    key_rows: int = 4
    """Rows of the key matrix whose sums are one meeting, and whose rows of the value matrix are asked for at once."""
    key_ahead: int = 2
    """Tiles of the key matrix that are asked for beyond these."""
    spare: int = 26
    """Registers of a thread beside a vector and tiles, where it holds nothing else and kernels overlap: what is left is
    for the next kernels' programs, which ask for their first weights meanwhile. At 128 there is no such limit."""
    pieces_from: int = 2049
    """Rows of so many columns, or more, are held as pieces where that leaves fewer threads idle (`rows.py`). From 2560
    on it is a gain; fewer, in programs of four warps at most, of which more find room, were not measured."""
    piece_rows: int = 1
    """Such rows of a tile. Of two, each would be with half of the threads, and the vector moved to both."""
    lerp_rows: int = 64
    """Tokens of one program that mixes inputs, where there are more than 16; half as many in float32."""
    lerp_cols: int = 64
    """Its channels."""
    lerp_split: int = 512
    """Up to so many tokens a program makes one of the five mixtures: more programs, each reading what they share."""
    span: int = 64
    """Tokens of a prompt one program works on, all spans at once: at least 16, in RWKV-7 at most 128. In float32 RWKV-6
    takes half as many; RWKV-7 a quarter, in float16 too."""
    least_decay: int = 80
    """RWKV-6: where half a block of a span decays by no more than 2 to the power of minus this, all its pairs of tokens
    are one product; blocks are halved until it is so. At 0 each size of block has a product."""
    carry_ahead: int = 16
    """RWKV-6: spans whose states a program asks for at once as it carries the state through a prompt."""
    padded: int = 97_000_000_000
    """Multiplications of a layer's products up to which a prompt is filled up to a size that has a graph: as many as a
    GPU makes while Python starts the layer's kernels."""
    deferred: int = 8
    """RWKV-6: tokens of a row whose updates of the state are made at once, kept beside it until then."""
    deferred_rows: int = 31
    """Batches beyond this size have theirs kept so."""
    tokens: int = 4
    """Of a prompt that one program gates, norms and shifts: two or four."""

    @property
    def launch(self) -> dict[str, Any]:
        """Options of a kernel that may start early."""
        return {"OVERLAP": True, "launch_pdl": True} if self.overlap else {"OVERLAP": False}

    @property
    def alone(self) -> Tuning:
        """For a kernel that cannot start early: one that follows two streams."""
        return replace(self, overlap=False)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Lengths of prompt that between them start every variant of the kernels."""
        return 2, self.span + 1, max(self.span, self.lerp_split) + 1

    def lerp_parts(self, M: int) -> int:
        """Of the five mixtures of M tokens, how many a program makes."""
        return 1 if self.lerp_split >= M else 5

    def lerp_tile(self, M: int, C: int, width: int) -> tuple[int, int]:
        """Tokens and channels of a program that multiplies by an adapter of numbers of `width` bytes.

        M tokens of C channels in all. float32 is multiplied by the ordinary units, which takes twice the registers.
        """
        channels = 1 << max(4, (C - 1).bit_length())
        return 16 if M <= 16 else self.lerp_rows * 2 // width, min(self.lerp_cols, channels)

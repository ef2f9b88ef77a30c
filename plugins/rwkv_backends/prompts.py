"""Prompts as CUDA graphs: their kernels are started faster than Python can start them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_backends.graphs import Graphs
from rwkv_runtime import Forward, Model, State

LEAST_STEP = 16
"""Prompts are filled up to a multiple of so many tokens at least."""
logger = logging.getLogger("rwkv_runtime")


class Padded(Protocol):
    """A `Forward` to which `length`, int64 [1], may say how many tokens of one sequence are there, at least 2. The rest
    are padding: they change neither the state nor the logits of the last token."""

    def __call__(self, tokens: Tensor, state: State, every: bool = False, length: Tensor | None = None) -> Tensor: ...


class CapturedPrompts:
    """A forward pass that reads one sequence by graphs where it has a length for which there is one.

    Of exactly so many tokens as `whole` has, the graph is captured when the first comes. What is shorter than `padded`
    is filled up to one of few sizes, always, so that what it says does not depend on what was read before; when the
    second of a size comes, that is captured. Where a graph cannot be, a warning says so, and its tokens are read in
    pieces of the next shorter length of `whole`, if there is one. Graphs have a state and logits of their own, which
    are copied to and from: a fraction of a thousandth of the time. Anything else goes to the forward pass as it is.
    Threads take turns: what one of them asks of the device comes in one piece.
    """

    def __init__(self, forward: Padded, model: Model, graphs: Graphs, whole: Collection[int], padded: int = 0) -> None:
        self.forward, self.model, self.graphs, self.whole, self.padded = forward, model, graphs, whole, padded
        self.narrow: Forward | None = getattr(forward, "narrow", None)
        self._chunks: dict[tuple[int, bool], _Chunk] = {}  # by size, and whether prompts are filled up to it
        self._buffers: _Buffers | None = None
        self._met = {(length, False) for length in whole}
        self._refused: set[tuple[int, bool]] = set()
        self._turn = threading.Lock()

    def __call__(self, tokens: Tensor, state: State, every: bool = False) -> Tensor:
        rows, T = tokens.shape
        fill = 1 < T < self.padded and T not in self.whole
        size = size_of(T) if fill else T
        if every or rows != 1 or state.own or not (fill or size in self.whole):
            return self.forward(tokens, state, every)
        with self._turn:
            if chunk := self._chunk(size, fill):
                return chunk.read(tokens, state)
        if fill:
            return self.forward(F.pad(tokens, (0, size - T)), state, length=tokens.new_full((1,), T))
        if shorter := max((n for n in self.whole if n < T), default=None):  # which may have found room
            return [self(piece, state) for piece in torch.split(tokens, shorter, dim=1)][-1]
        return self.forward(tokens, state)

    def _chunk(self, size: int, fill: bool) -> _Chunk | None:
        key = size, fill
        if key not in self._met:
            self._met.add(key)
        elif key not in self._chunks and key not in self._refused:
            try:
                self._buffers = self._buffers or _Buffers(self.model)
                self._chunks[key] = _Chunk(self.forward, self._buffers, self.graphs, size, fill)
            except RuntimeError as error:  # no memory for it, say
                self._refused.add(key)
                reason = str(error).strip().splitlines()[0]
                logger.warning(f"{size} tokens at once are read without a captured graph, which is slower: {reason}")
        return self._chunks.get(key)


def size_of(length: int) -> int:
    """The first that holds so many tokens of the sizes that prompts are filled up to: four from a power of two to the
    next."""
    step = max(LEAST_STEP, (1 << (length - 1).bit_length()) >> 3)
    return -(-length // step) * step


class _Buffers:
    """What all graphs read and write: no two of them run at once."""

    def __init__(self, model: Model) -> None:
        with torch.inference_mode(False):  # callers of either mode write to them
            self.state = model.new_state()
            self.logits = torch.zeros((1, model.config.vocab_size), device=model.device)
            self.length = torch.ones(1, dtype=torch.int64, device=model.device)


class _Chunk:
    """One captured size. Raises RuntimeError where it cannot be captured."""

    def __init__(self, forward: Padded, buffers: _Buffers, graphs: Graphs, size: int, fill: bool) -> None:
        self.buffers, self.fill = buffers, fill
        state, logits, length = buffers.state, buffers.logits, buffers.length if fill else None
        with torch.inference_mode(False):
            self.tokens = torch.zeros((1, size), dtype=torch.int64, device=logits.device)

        def chunk() -> None:
            logits.copy_(forward(self.tokens, state, length=length))

        with torch.no_grad():
            self.replay = graphs.capture(chunk, [*state.tensors.values(), logits])

    def read(self, tokens: Tensor, state: State) -> Tensor:
        T, buffers = tokens.shape[1], self.buffers
        self.tokens[:, :T].copy_(tokens)
        if self.fill:
            buffers.length.fill_(T)
        for name, own in buffers.state.tensors.items():
            own.copy_(state[name])
        self.replay()
        for name, own in buffers.state.tensors.items():
            state[name].copy_(own)
        return buffers.logits.clone()

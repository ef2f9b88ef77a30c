"""A whole chunk of a long prompt as one CUDA graph: its kernels are started faster than Python can start them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

import torch
from torch import Tensor

from rwkv_backends.graphs import Graphs
from rwkv_runtime import Forward, Model, State

logger = logging.getLogger("rwkv_runtime")


class CapturedPrompts:
    """A forward pass that reads one sequence of exactly so many tokens by a graph, captured when the first comes.

    The graph has tokens, state and logits of its own, which are copied to and from: a fraction of a thousandth of the
    time. Anything else goes to the forward pass as it is, and all of it where a graph cannot be captured. Threads take
    turns: what one of them asks of the device comes in one piece.
    """

    def __init__(self, forward: Forward, model: Model, graphs: Graphs, lengths: Collection[int]) -> None:
        self.forward, self.model, self.graphs, self.lengths = forward, model, graphs, lengths
        self.narrow: Forward | None = getattr(forward, "narrow", None)
        self._chunks: dict[int, _Chunk] = {}
        self._refused = False
        self._turn = threading.Lock()

    def __call__(self, tokens: Tensor, state: State, every: bool = False) -> Tensor:
        rows, length = tokens.shape
        if every or rows != 1 or length not in self.lengths:
            return self.forward(tokens, state, every)
        with self._turn:
            if length not in self._chunks and not self._refused:
                self._capture(length)
            if length in self._chunks:
                return self._chunks[length].read(tokens, state)
        return self.forward(tokens, state, every)

    def _capture(self, length: int) -> None:
        try:
            self._chunks[length] = _Chunk(self.forward, self.model, self.graphs, length)
        except RuntimeError as error:  # no memory for it, say
            self._refused = True
            reason = str(error).strip().splitlines()[0]
            logger.warning(f"prompts are read without a captured graph, which is slower: {reason}")


class _Chunk:
    """One captured chunk. Raises RuntimeError where it cannot be captured."""

    def __init__(self, forward: Forward, model: Model, graphs: Graphs, length: int) -> None:
        with torch.inference_mode(False):  # its buffers are written to by callers of either mode
            self.tokens = torch.zeros((1, length), dtype=torch.int64, device=model.device)
            self.state = model.new_state()
            self.logits = torch.zeros((1, model.config.vocab_size), device=model.device)

        def chunk() -> None:
            self.logits.copy_(forward(self.tokens, self.state))

        with torch.no_grad():
            self.replay = graphs.capture(chunk, [*self.state.tensors.values(), self.logits])

    def read(self, tokens: Tensor, state: State) -> Tensor:
        self.tokens.copy_(tokens)
        for name, own in self.state.tensors.items():
            own.copy_(state[name])
        self.replay()
        for name, own in self.state.tensors.items():
            state[name].copy_(own)
        return self.logits.clone()

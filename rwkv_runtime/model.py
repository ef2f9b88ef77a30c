"""What a model is: an architecture (the arithmetic), a configuration (the sizes) and its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rwkv_runtime.state import State, TensorSpec


class Place(Protocol):
    """(name in the file, tensor) -> the same values, checked, on the model's device, in its dtype or the one given.

    A large tensor may be given in pieces. Raises CheckpointError for a value that is not finite.
    """

    quant: str | None
    """The quantization asked for, one of the architecture's own; the architecture quantizes what `place` gave it."""

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, all inferred from the shapes of its tensors."""

    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    n_ffn: int
    vocab_size: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of the low-rank adapters, by the architecture's own names."""


class Architecture(ABC):
    """The arithmetic of one model family.

    It owns the loop over layers and calls its ops by name, so that a backend can run the same loop
    with compiled, scripted or hand-written ops.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    ops: ClassVar[Mapping[str, Callable[..., Any]]]
    """Typed tensor functions that torch.jit.script accepts, by name."""
    quantizations: ClassVar[Sequence[str]] = ()
    """Names that `--quant` may have: how `weights` can make what it returns smaller than the file has it."""
    rounded: ClassVar[Sequence[str]] = ()
    """Names of `state_spec` that may be kept in 16 bits where they are float32; `forward` widens them."""

    @abstractmethod
    def why_not(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """None where these tensors are a model of this family; otherwise what they look like instead."""

    @abstractmethod
    def config(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        """Infers all sizes. Raises CheckpointError for a missing tensor or a wrong shape, naming it."""

    @abstractmethod
    def weights(self, tensors: Mapping[str, Tensor], config: ModelConfig, place: Place, dtype: torch.dtype) -> Any:
        """Folds and stacks what can be, once; every tensor goes through `place`, which checks and moves it."""

    @abstractmethod
    def state_spec(self, config: ModelConfig, dtype: torch.dtype) -> Mapping[str, TensorSpec]:
        """What one row of the state holds in each layer."""

    def initial_state(self, tensors: Mapping[str, Tensor], config: ModelConfig, place: Place) -> dict[str, Tensor]:
        """What a fresh row starts from, [L, ...] by name of `state_spec`; a name left out starts at zero."""
        return {}

    @abstractmethod
    def forward(
        self,
        ops: Mapping[str, Callable[..., Any]],
        weights: Any,
        tokens: Tensor,
        state: State,
        every: bool = False,
    ) -> Tensor:
        """Reads tokens [B, T] and updates the state in place.

        Returns float32 logits of the last position [B, V], or of every position [B, T, V].
        """

    @abstractmethod
    def sizes(self, n_layer: int, n_embd: int, vocab_size: int, head_size: int = 64) -> ModelConfig:
        """The family's usual proportions for a model of these sizes."""

    @abstractmethod
    def random(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A checkpoint of these sizes with random weights, for tests and benchmarks."""

    @abstractmethod
    def reference(self, tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
        """The oracle: float64 logits after every token [T, V], computed naively from a checkpoint's own tensors."""


@dataclass(frozen=True)
class Model:
    """A loaded model. It holds no state of any text; many engines may share it."""

    architecture: Architecture
    config: ModelConfig
    weights: Any
    device: torch.device
    dtype: torch.dtype
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = ""
    quant: str | None = None
    state_dtype: torch.dtype = torch.float32
    """Of what the architecture has as `rounded`."""

    def new_state(self, rows: int = 1) -> State:
        """Fresh state of `rows` rows on the model's device."""
        spec = dict(self.architecture.state_spec(self.config, self.dtype))
        for name in self.architecture.rounded:
            if spec[name].dtype == torch.float32:
                spec[name] = spec[name]._replace(dtype=self.state_dtype)
        return State.allocate(spec, self.config.n_layer, rows, self.device, self.initial, self.architecture.name)

"""The recurrent state of a batch: one row a sequence, constant in size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from rwkv_runtime.errors import StateError

if TYPE_CHECKING:
    from typing_extensions import Self


class TensorSpec(NamedTuple):
    """Shape and dtype of what one row holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def allocate(self, leading: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.zeros(leading + self.shape, dtype=self.dtype, device=device)


def _write(kept: Tensor, value: Tensor) -> None:
    """What is beyond float16's range becomes its largest number, not infinity."""
    if kept.dtype == torch.float16 and value.dtype != torch.float16:
        value = value.clamp(-65504.0, 65504.0)
    kept.copy_(value)


class State:
    """Named tensors [L, B, ...]: layer first, so that one layer of all rows is contiguous; then the row.

    `initial` holds what a fresh row starts from, [L, ...] by name; a name that is not in it starts at zero.
    `architecture` is the name of the one whose state it is, "" where that is not known.

    A subclass may hold more: it is made as this is, all that it knows being in its tensors, and names those of its own.
    """

    own: ClassVar[frozenset[str]] = frozenset()
    """Tensors that the architecture's states do not have: zero in a row that comes from one of these."""

    def __init__(
        self, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None, architecture: str = ""
    ) -> None:
        self.tensors = dict(tensors)
        self.initial = dict(initial or {})
        self.architecture = architecture

    @classmethod
    def allocate(
        cls,
        specs: Mapping[str, TensorSpec],
        layers: int,
        rows: int,
        device: torch.device,
        initial: Mapping[str, Tensor] | None = None,
        architecture: str = "",
    ) -> State:
        """A state of `rows` fresh rows."""
        tensors = {name: spec.allocate((layers, rows), device) for name, spec in specs.items()}
        state = cls(tensors, initial, architecture)
        for row in range(rows if initial else 0):
            state.clear(row)
        return state

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def rows(self) -> int:
        """How many sequences this state holds."""
        return next(iter(self.tensors.values())).shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def view(self, start: int, stop: int) -> Self:
        """Rows start..stop as a state that shares memory with this one."""
        return type(self)({name: t[:, start:stop] for name, t in self.tensors.items()}, self.initial, self.architecture)

    def clone(self) -> Self:
        return type(self)({name: t.clone() for name, t in self.tensors.items()}, self.initial, self.architecture)

    @property
    def plain(self) -> State:
        """This one without what is a subclass's own; it shares memory with it."""
        tensors = {name: t for name, t in self.tensors.items() if name not in self.own}
        return State(tensors, self.initial, self.architecture)

    def settled(self, row: int) -> State:
        """One row as a state of its own, as the architecture has them."""
        return self.plain.view(row, row + 1).clone()

    def clear(self, row: int) -> None:
        """Makes a row fresh."""
        for name, t in self.tensors.items():
            if name in self.initial:
                _write(t[:, row], self.initial[name])
            else:
                t[:, row].zero_()

    def copy(self, source: State, source_row: int, row: int) -> None:
        """Copies one row of another state (or of this one) into a row of this one.

        Raises StateError where the two do not have the same shapes.
        """
        self.check(source)
        for name, t in self.tensors.items():
            if name in source.tensors:
                _write(t[:, row], source.tensors[name][:, source_row])
            else:
                t[:, row].zero_()

    def keep(self, name: str, layer: int, value: Tensor) -> None:
        """Makes `value` [B, ...] what all rows hold in a layer, rounded where they are kept in fewer bits."""
        _write(self.tensors[name][layer], value)

    def check(self, other: State) -> None:
        """Raises StateError unless `other` has this state's architecture, names, shapes (rows apart) and layers."""
        if self.architecture and other.architecture and self.architecture != other.architecture:
            raise StateError(f"the state of a model of {other.architecture}; this one is {self.architecture}")
        lacking = self.own - other.own
        for name, t in self.tensors.items():
            theirs = other.tensors.get(name)
            if theirs is None and name in lacking:
                continue
            if theirs is None:
                raise StateError(f"the state has no tensor {name!r}: it belongs to another architecture")
            if theirs.dim() != t.dim() or theirs.shape[0] != t.shape[0] or theirs.shape[2:] != t.shape[2:]:
                raise StateError(
                    f"the state's {name!r} is {list(theirs.shape)}, this model's is {list(t.shape)}: "
                    "it belongs to a model of another size"
                )
        extra = sorted(other.tensors.keys() - self.tensors.keys())
        if extra:
            raise StateError(f"the state has a tensor {extra[0]!r} that this architecture does not know")

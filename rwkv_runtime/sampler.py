"""How a token is chosen: samplers, their parameters, and the per-row values they read."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rwkv_runtime import noise
from rwkv_runtime.errors import OptionError, PluginError
from rwkv_runtime.state import TensorSpec

Where = Literal["graph", "device", "host"]
"""Inside a captured graph; on the device, outside the graph; on the CPU."""


@dataclass(frozen=True)
class Param:
    """One number that a sampler reads. The default decides its type: an int stays an int."""

    default: float
    low: float = -math.inf
    high: float = math.inf
    help: str = ""
    off: float | None = None
    """The neutral value, at which the parameter does nothing."""

    def check(self, name: str, value: object) -> float:
        """The value as a number of this parameter's type. Raises OptionError with the range."""
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        try:
            number = float(str(value))
        except ValueError:
            raise OptionError(f"{name} is {kind}, not {value!r}") from None
        whole = isinstance(self.default, int)
        if not self.low <= number <= self.high or (whole and not number.is_integer()):
            raise OptionError(f"{name} is {kind} from {self.low:g} to {self.high:g}, not {value}")
        return int(number) if whole else number


class Controls:
    """What a sampler reads for each of B rows, all in tensors on the device, so that no row forces a recapture.

    `controls["top_p"]` is [B, 1]: float32, or int64 for a whole-number parameter. `seed` and `position` are int64
    [B, 1]; `slots` holds the samplers' own memory, [B, ...] by name.
    """

    def __init__(
        self, values: Mapping[str, Tensor], seed: Tensor, position: Tensor, slots: Mapping[str, Tensor], ids: Tensor
    ) -> None:
        self.values = dict(values)
        self.seed = seed
        self.position = position
        self.slots = dict(slots)
        self.ids = ids  # [1, V]

    @classmethod
    def allocate(cls, sampler: Sampler, rows: int, vocab_size: int, device: torch.device) -> Controls:
        """Controls of `rows` rows, every parameter at its default."""
        values = {}
        for name, param in sampler.params.items():
            dtype = torch.int64 if isinstance(param.default, int) else torch.float32
            values[name] = torch.full((rows, 1), param.default, dtype=dtype, device=device)
        slots = {name: spec.allocate((rows,), device) for name, spec in sampler.slots(vocab_size).items()}
        seed, position = (torch.zeros((rows, 1), dtype=torch.int64, device=device) for _ in range(2))
        return cls(values, seed, position, slots, torch.arange(vocab_size, device=device)[None])

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def view(self, rows: int) -> Controls:
        """The first rows, sharing memory."""
        values = {name: t[:rows] for name, t in self.values.items()}
        slots = {name: t[:rows] for name, t in self.slots.items()}
        return Controls(values, self.seed[:rows], self.position[:rows], slots, self.ids)

    def buffers(self) -> list[Tensor]:
        """Every per-row tensor."""
        return [*self.values.values(), self.seed, self.position, *self.slots.values()]

    def set(self, row: int, values: Mapping[str, float], seed: int, position: int) -> None:
        """Starts a row: its parameters, the low 64 bits of its seed, its position; its slots are cleared."""
        for name, value in values.items():
            self.values[name][row] = value
        self.seed[row] = (seed & 0xFFFFFFFFFFFFFFFF) - ((seed >> 63 & 1) << 64)
        self.position[row] = position
        for slot in self.slots.values():
            slot[row].zero_()

    def move(self, source: int, row: int) -> None:
        """Copies all of one row into another."""
        for t in self.buffers():
            t[row].copy_(t[source])

    def draw(self, logits: Tensor) -> Tensor:
        """Draws from softmax(logits), [B, V] -> [B], by the Gumbel-max trick with counter-based noise.

        A row where nothing can be drawn (NaN, +inf, or all masked) gives -1.
        """
        best = logits.amax(dim=-1)
        noisy = logits + noise.gumbel(self.seed, self.position, self.ids)
        return torch.where(best.isfinite(), noisy.argmax(dim=-1), -1)


class Sampler(ABC):
    """One way to choose a token. Most samplers write `filter` alone.

    Neither method may change its input, mix rows, or (where `runs` is "graph") synchronise with the host.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    params: ClassVar[Mapping[str, Param]] = {}
    runs: Where = "device"

    def slots(self, vocab_size: int) -> Mapping[str, TensorSpec]:
        """Memory of each row, for samplers that remember what was drawn."""
        return {}

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        """float32 [B, V] -> [B, V]: the logits to draw from; -inf for a token that is not kept."""
        return logits

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        """float32 [B, V] -> int64 [B]; -1 for a row where nothing can be drawn."""
        return controls.draw(self.filter(logits, controls))

    def update(self, tokens: Tensor, controls: Controls) -> None:  # noqa: B027  (optional)
        """Remembers the drawn tokens, int64 [B], in the slots; an entry of -1 is a row that failed."""


class Chain(Sampler):
    """Samplers in a row: each one's filter in order, then one draw."""

    def __init__(self, stages: Sequence[Sampler]) -> None:
        """Raises OptionError where two stages have a parameter of the same name, or one has no filter."""
        self.stages = tuple(stages)
        self.label = ",".join(stage.name for stage in stages)
        params: dict[str, Param] = {}
        for stage in stages:
            kind = type(stage)
            if kind.filter is Sampler.filter and kind.sample is not Sampler.sample:
                raise OptionError(f"sampler {stage.name} draws in its own way; it cannot be part of a chain")
            for name, param in stage.params.items():
                if name in params:
                    raise OptionError(f"the chain {self.label} has {name!r} twice; leave one of the two samplers out")
                params[name] = param
        self.params = params  # type: ignore[misc]
        order: tuple[Where, ...] = ("graph", "device", "host")
        self.runs = max((stage.runs for stage in stages), key=order.index)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    def slots(self, vocab_size: int) -> Mapping[str, TensorSpec]:
        slots: dict[str, TensorSpec] = {}
        for stage in self.stages:
            for name, spec in stage.slots(vocab_size).items():
                if name in slots:
                    raise PluginError(f"sampler {stage.name}: its slot {name!r} is another sampler's too; rename it")
                slots[name] = spec
        return slots

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        for stage in self.stages:
            logits = stage.filter(logits, controls)
        return logits

    def update(self, tokens: Tensor, controls: Controls) -> None:
        for stage in self.stages:
            stage.update(tokens, controls)


def check_params(sampler: Sampler, given: Mapping[str, object]) -> dict[str, float]:
    """Every parameter of the sampler, as given or at its default. Raises OptionError for a name it does not have."""
    from difflib import get_close_matches

    for name in given:
        if name not in sampler.params:
            near = get_close_matches(name, sampler.params, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sampler.params) or 'none'}"
            raise OptionError(f"sampler {sampler.name} has no parameter {name!r}; {hint}")
    return {name: p.check(name, given.get(name, p.default)) for name, p in sampler.params.items()}

"""How a token is chosen: samplers, their parameters, and chains of them."""

from __future__ import annotations

import json
import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rwkv_runtime.controls import Controls
from rwkv_runtime.errors import OptionError, PluginError, RwkvError, did_you_mean
from rwkv_runtime.state import TensorSpec

Where = Literal["graph", "device", "host"]
"""Inside a captured graph; on the device, outside the graph; on the CPU."""


MOST_WHOLE, MOST = 2.0**53, 3.4028234663852886e38
"""Up to where a float64 has all whole numbers; the largest float32, in which other parameters are kept."""


@dataclass(frozen=True)
class Param:
    """One setting of a sampler. The default decides its type: an int stays an int, a text a text.

    Texts are in `controls.notes`, which `prime` may read, and `prepare` where `runs` is "host"; nothing that runs in a
    graph may.
    """

    default: float | str
    low: float = -math.inf
    high: float = math.inf
    help: str = ""
    off: float | str | None = None
    """The neutral value, at which the parameter does nothing."""

    def check(self, name: str, value: object) -> float | str:
        """The value as this parameter's type; for a text, a dictionary or a list becomes JSON.

        Raises OptionError with the range.
        """
        if isinstance(self.default, str):
            if value is None or isinstance(value, bool):
                raise OptionError(f"{name} is a text, not {value!r}")
            return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        try:
            number = float(str(value))
        except ValueError:
            raise OptionError(f"{name} is {kind}, not {value!r}") from None
        whole = isinstance(self.default, int)
        if not self.low <= number <= self.high or (whole and not number.is_integer()):
            raise OptionError(f"{name} is {kind} from {self.bounds()}, not {value}")
        most = MOST_WHOLE if whole else MOST
        if math.isfinite(number) and abs(number) > most:
            raise OptionError(f"{name} is {kind} of at most {most:g}, not {value}")
        return int(number) if whole else number

    def bounds(self) -> str:
        """The least and the largest value of a number, in words."""
        whole = isinstance(self.default, int)
        low, high = (f"{n:,.0f}" if whole and math.isfinite(n) else f"{n:g}" for n in (self.low, self.high))
        return f"{low} to {high}"


class Sampler(ABC):
    """One way to choose a token. Most samplers write `filter` alone.

    No method may change its tensors of logits, mix rows, or (where `runs` is "graph") synchronise with the host.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    params: ClassVar[Mapping[str, Param]] = {}
    runs: Where = "device"
    refuses: bool = False
    """Whether `sample` gives -1 for every row that has NaN or +inf, or nothing to draw from. Of other samplers the
    engine looks at all logits once more."""

    @property
    def stages(self) -> tuple[Sampler, ...]:
        """The samplers this one is made of, in their order: itself, unless it is a chain."""
        return (self,)

    def check(self, params: Mapping[str, float | str]) -> None:  # noqa: B027  (optional)
        """Judges the parameters, each within its own bounds, as far as that takes no model.

        Called before a model is loaded, and for every request. Raises OptionError for what cannot be honoured.
        """

    def slots(self, vocab_size: int) -> Mapping[str, TensorSpec]:
        """Memory of each row, for samplers that remember what was drawn."""
        return {}

    def prime(self, tokens: Tensor, controls: Controls) -> None:  # noqa: B027  (optional)
        """Reads the prompt, int64 [T] (its last tokens, where it is long), before the first draw of a row.

        `controls` are of that row alone. Settings that only the model or the prompt can judge raise OptionError here.
        """

    def prepare(self, controls: Controls) -> None:  # noqa: B027  (optional)
        """Host work for the next draw, while the device runs the forward pass; for `runs = "host"` alone."""

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        """float32 [B, V] -> [B, V]: the logits to draw from; -inf for a token that is not kept.

        It may be called more than once for one draw, with the same result.
        """
        return logits

    def sample(self, logits: Tensor, controls: Controls) -> Tensor:
        """float32 [B, V] -> int64 [B]; -1 for a row where nothing can be drawn."""
        return controls.draw(self.filter(logits, controls))

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:  # noqa: B027  (optional)
        """Remembers the drawn tokens, int64 [B], in the slots; -1 is a row that failed, or that draws nothing.

        `logits` [B, V] are those that `filter` was given.
        """


class Chain(Sampler):
    """Samplers in a row: each one's filter in order, then one draw."""

    def __init__(self, stages: Sequence[Sampler]) -> None:
        """Raises OptionError where two stages have a parameter of the same name, or one has no filter."""
        self._stages = tuple(stages)
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
        remembers = [i for i, stage in enumerate(stages) if type(stage).update is not Sampler.update]
        self._remembering = remembers[-1] + 1 if remembers else 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    @property
    def stages(self) -> tuple[Sampler, ...]:
        return self._stages

    def check(self, params: Mapping[str, float | str]) -> None:
        for stage in self.stages:
            stage.check({name: params[name] for name in stage.params})

    def slots(self, vocab_size: int) -> Mapping[str, TensorSpec]:
        slots: dict[str, TensorSpec] = {}
        for stage in self.stages:
            for name, spec in stage.slots(vocab_size).items():
                if name in slots:
                    raise PluginError(f"sampler {stage.name}: its slot {name!r} is another sampler's too; rename it")
                slots[name] = spec
        return slots

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        for stage in self.stages:
            stage.prime(tokens, controls)

    def prepare(self, controls: Controls) -> None:
        for stage in self.stages:
            stage.prepare(controls)

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        for stage in self.stages:
            logits = stage.filter(logits, controls)
        return logits

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        # Each stage is shown what it filtered. Only stages before the last that remembers anything are run again,
        # all of them before the first memory changes.
        inputs = [logits]
        for stage in self.stages[: max(self._remembering - 1, 0)]:
            inputs.append(stage.filter(inputs[-1], controls))
        for stage, given in zip(self.stages[: self._remembering], inputs, strict=False):
            stage.update(tokens, given, controls)


def check_params(sampler: Sampler, given: Mapping[str, object]) -> dict[str, float | str]:
    """Every parameter of the sampler, as given or at its default.

    Raises OptionError for a name it does not have, or a value it refuses.
    """
    for name in given:
        if name not in sampler.params:
            hint = did_you_mean(name, sampler.params, f"it has {', '.join(sampler.params) or 'none'}")
            raise OptionError(f"sampler {sampler.name} has no parameter {name!r}; {hint}")
    params = {name: p.check(name, given.get(name, p.default)) for name, p in sampler.params.items()}
    try:
        sampler.check(params)
    except RwkvError:
        raise
    except Exception as error:  # a stranger's sampler may raise anything
        raise OptionError(f"sampler {sampler.name} cannot take these: {type(error).__name__}: {error}") from error
    return params

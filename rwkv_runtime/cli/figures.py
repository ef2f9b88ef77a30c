"""The figures shown after each text."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Generation


@dataclass(frozen=True)
class Figures:
    """Rates in tokens a second, times in seconds, memory in bytes; None where there is nothing to measure."""

    prompt_tokens: int
    prompt_rate: float | None
    tokens: int
    rate: float | None
    rate_without_sampling: float | None
    first_token: float | None
    memory: int | None
    device_memory: int | None
    finish: str | None

    @classmethod
    def of(cls, generation: Generation, engine: Engine) -> Figures:
        """Measures the sampler once more by itself, to tell its share of a step."""
        times, count = generation.times, len(generation.tokens)
        reading, writing = times.prefilled - times.started, times.last - times.prefilled
        steps = count + (generation.error is not None)
        thinking = writing - steps * engine.sampling_seconds() if count else 0.0
        return cls(
            prompt_tokens=len(generation.feed) if generation.request.prompt or not generation.request.start else 0,
            prompt_rate=generation.read / reading if generation.read and reading > 0 else None,
            tokens=count,
            rate=count / writing if count and writing > 0 else None,
            rate_without_sampling=count / thinking if thinking > 0 else None,
            first_token=times.first - times.submitted if times.first else None,
            memory=peak_memory(),
            device_memory=torch.cuda.max_memory_allocated() if engine.model.device.type == "cuda" else None,
            finish=generation.finish,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for a person."""
        parts = ["prompt read before"]
        if self.prompt_tokens:
            rate = f", {self.prompt_rate:.0f}/s" if self.prompt_rate else ""
            parts = [f"prompt {self.prompt_tokens} token{'s' * (self.prompt_tokens != 1)}{rate}"]
        written = f"wrote {self.tokens} token{'s' * (self.tokens != 1)}"
        if self.rate:
            written += f", {self.rate:.1f}/s"
        if self.rate_without_sampling:
            written += f" ({self.rate_without_sampling:.1f}/s without sampling)"
        parts.append(written)
        if self.first_token is not None:
            parts.append(f"first token {self.first_token:.2f} s")
        if self.memory:
            parts.append(f"memory {self.memory / 1e6:.0f} MB")
        if self.device_memory:
            parts.append(f"GPU {self.device_memory / 1e6:.0f} MB")
        return " | ".join([*parts, f"ended by {self.finish}"])


def peak_memory() -> int | None:
    """Most memory this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

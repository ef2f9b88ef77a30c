"""Learning rate and source mix by progress, so that a run limited by time still ends fully annealed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# What is read more often is learnt by heart, so the small sources' shares are bounded.  In the decay phase simple
# stories take a larger part: they set the default voice.
MAIN_MIX: Mapping[str, float] = {
    "gpt4omini_stories": 0.66,
    "tinystories_pieces": 0.20,
    "pd_fairytaleqa": 0.03,
    "pd_chilit": 0.08,
    "ccby_picture_books": 0.03,
}
DECAY_MIX: Mapping[str, float] = {
    "gpt4omini_stories": 0.66,
    "tinystories_pieces": 0.30,
    "ccby_picture_books": 0.04,
}

SYNTHETIC = "synthetic"  # the name of the source that teachers wrote
# What teachers wrote after TinyStories takes most of the place of TinyStories, of which there is least.
STUDENT_MAIN_MIX: Mapping[str, float] = {
    "gpt4omini_stories": 0.48,
    "tinystories_pieces": 0.09,
    SYNTHETIC: 0.33,
    "pd_fairytaleqa": 0.02,
    "pd_chilit": 0.06,
    "ccby_picture_books": 0.02,
}
STUDENT_DECAY_MIX: Mapping[str, float] = {
    "gpt4omini_stories": 0.45,
    "tinystories_pieces": 0.14,
    SYNTHETIC: 0.38,
    "ccby_picture_books": 0.03,
}

BEST_OF = ("gpt4omini_stories", "tinystories_pieces")  # what the model is for: these decide when it was best


@dataclass(frozen=True)
class Budget:
    """A run ends after ``steps`` or after ``minutes``, whichever comes first; None is no limit in time."""

    steps: int
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over: 0 at the start, at least 1 when it ends."""
        timed = 0.0 if self.minutes is None else seconds / (60.0 * self.minutes)
        return max(step / self.steps, timed)


@dataclass(frozen=True)
class Schedule:
    """Warm-up, stable phase and decay (WSD); the decay is 1 - sqrt (Hägele et al. 2024, arXiv 2405.18392)."""

    peak: float = 3e-3
    warmup_steps: int = 300
    decay_share: float = 0.25

    def decaying(self, progress: float) -> bool:
        return progress >= 1.0 - self.decay_share

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        over = (progress - (1.0 - self.decay_share)) / self.decay_share
        return self.peak * warm * (1.0 - math.sqrt(min(max(over, 0.0), 1.0)))


def parse_mix(text: str) -> dict[str, float]:
    """``source=share,source=share`` as a mapping.

    Raises:
        ValueError: an item is not of that form or a share is negative.
    """
    mix: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        mix[name.strip()] = float(share)
        if mix[name.strip()] < 0:
            raise ValueError(f"the share of {name.strip()} is negative")
    return mix


def format_mix(mix: Mapping[str, float]) -> str:
    """The inverse of :func:`parse_mix`."""
    return ",".join(f"{name}={share:g}" for name, share in mix.items())

"""Which of a run's evaluations was best.

The decay phase reads small sources so often that they are learnt by heart before it ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Best:
    """The lowest held-out loss so far, the mean over some sources in bits per byte."""

    sources: Sequence[str]
    bits: float = math.inf
    step: int = 0

    def improved(self, heldout: Mapping[str, float], step: int) -> bool:
        """Take note of an evaluation; whether it is the best."""
        bits = math.fsum(heldout[name] for name in self.sources) / len(self.sources)
        if not bits < self.bits:
            return False
        self.bits, self.step = bits, step
        return True

"""From tokens to text as it streams: stop strings that span tokens, and nothing held back longer than needed."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until one of the stop strings is complete; the stop string itself is not passed.

    The first to be complete counts, and of two that are complete at once the longer one, so that the text
    is the same however it came in pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now. What could still become a stop string is held."""
        if not self.stops:
            return text
        if self.found is not None:
            return ""
        self.held += text
        hits = [(at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            shown, self.held = self.held[:at], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def finish(self) -> str:
        """What was held, now that no more text comes."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

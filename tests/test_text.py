"""Stop strings are found wherever tokens part them, and nothing is held back longer than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_runtime.text import StopMatcher

words = st.text("ab\n", min_size=1, max_size=5)


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What comes before the stop string that is complete first, and which it is; letter by letter."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(words, max_size=4), st.lists(st.text("ab\n", max_size=4), max_size=12))
def test_any_pieces_give_the_text_before_the_first_stop(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces) + matcher.finish()
    assert (shown, matcher.found) == plain("".join(pieces), stops)


@given(st.lists(words, min_size=1, max_size=4), st.text("ab\n", max_size=30))
def test_only_what_could_still_become_a_stop_is_held(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.push, text))
    if matcher.found is None:
        held = text[len(shown) :]
        assert shown + held == text
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        starts = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == (starts[0] if starts else "")


def test_a_stop_across_pieces_is_not_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi", "\n", "\nUs", "er", ": x")] == ["Hi", "", "", "", ""]
    assert matcher.found == "\n\nUser:"
    assert matcher.finish() == matcher.push("more") == ""


def test_the_beginning_of_a_stop_that_does_not_go_on_is_shown_at_once() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hi", "\n", "\n", "U", "p")] == ["Hi", "", "", "", "\n\nUp"]


def test_the_beginning_of_a_stop_is_shown_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stops_everything_passes(stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert matcher.push("anything") == "anything"
    assert matcher.found is None

"""What rwkv-run shows of its progress: on a terminal alone, and gone when there is something else to show."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from cli_runs import at_a_terminal, save_tiny_model, shown_at, started

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A prompt that takes longer to read than the two seconds there are."""
    (tmp_path / "book.txt").write_text("Once upon a time. " * 60_000, encoding="utf-8")
    return ["--file", str(tmp_path / "book.txt"), "--seconds", "2"]


def test_a_long_prompt_shows_how_far_it_is_read(tiny: Path, endless: list[str]) -> None:
    with at_a_terminal(tiny, *endless) as (process, terminal):
        shown = shown_at(terminal)
        assert process.wait(timeout=60) == 0
    _, bar, after = shown.rpartition(b"reading:")
    assert bar
    assert b"/1.08M" in after
    assert b"token/s" in after
    assert after.rpartition(b"\r\n[")[0].endswith(b"\r")  # the bar's line is blank again
    assert b"ended by time" in after
    assert b"Once upon a time" not in shown  # nothing was written, so it is not shown what it would have followed


def test_off_a_terminal_and_for_a_short_prompt_nothing_is_shown(tiny: Path, endless: list[str]) -> None:
    process = started(tiny, *endless)
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, text) == (0, b"\n")
    assert len(errors.splitlines()) == 1
    with at_a_terminal(tiny, "Once", "--max-tokens", "3", "--seed", "1") as (process, terminal):
        shown = shown_at(terminal)
        assert process.wait(timeout=60) == 0
    assert shown.startswith(b"Once")
    assert b"reading" not in shown


def test_many_prompts_show_a_bar_and_then_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"Hello"\n"Once"\n', encoding="utf-8")
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with at_a_terminal(tiny, *files, "--max-tokens", "40") as (process, terminal):
        shown = shown_at(terminal)
        assert process.wait(timeout=60) == 0
    assert b"| 0/2 [" in shown
    *_, cleared, line, end = re.split(rb"[\r\n]+", shown)
    assert (cleared.strip(), end) == (b"", b"")
    assert line.startswith(b"2 of 2 lines done; their records are in ")
    assert line.endswith(b"/s | eager]")

"""One command for the story model: what it runs, in which order, and what it leaves out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from training import reproduce


def test_the_commands_can_be_read_before_they_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["corpus", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.replace(str(tmp_path), "RUN").splitlines()
    words = [line.split()[2] for line in lines]
    assert words == ["training.prepare", *["training.train"] * 2, *["training.synthesise"] * 2, "training.train"]
    assert lines[-1].endswith("--synthetic RUN/one.npy --synthetic RUN/two.npy")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that are started; each makes its result, but a second `synthesise` fails."""
    started: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        started.append(command[2])
        failed = started.count("training.synthesise") == 2 and command[2] == "training.synthesise"
        if not failed:
            folder = Path(command[4])
            if command[2] == "training.synthesise":
                folder.touch()
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ("meta.json" if command[2] == "training.prepare" else "model.safetensors")).touch()
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return started


def test_a_step_that_fails_ends_it_and_the_next_start_goes_on_there(tmp_path: Path, run_steps: list[str]) -> None:
    assert reproduce.main(["corpus", str(tmp_path)]) == 1
    assert len(run_steps) == 5
    assert reproduce.main(["corpus", str(tmp_path)]) == 0
    assert run_steps[5:] == ["training.synthesise", "training.train"]

"""How far a GPU is with a prompt: the host starts one chunk ahead, and no more."""

from __future__ import annotations

import pytest
import torch

from rwkv_runtime import flight
from rwkv_runtime.flight import Reading


class Event:
    """The end of some work, which is done when it is waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.number = log, sum(line.startswith("record") for line in log)

    def record(self, stream: object) -> None:
        self.log.append(f"record {self.number}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.number}")

    def elapsed_time(self, other: Event) -> float:
        return 250.0 * (other.number - self.number)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(flight, "_record", lambda event, device: event.record(None))
    return []


def test_one_chunk_is_at_work_and_one_waits(log: list[str]) -> None:
    reading = Reading(torch.device("cpu"), lambda: Event(log))
    for _ in range(3):
        log.append("start")
        reading.started_chunk()
    assert log == [
        "record 0",
        *["start", "record 1", "wait 0", "start", "record 2", "wait 1", "start", "record 3", "wait 2"],
    ]
    assert reading.seconds() == 0.75

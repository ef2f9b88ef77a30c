"""How far a GPU is with a prompt: the host starts one chunk ahead, and no more."""

from __future__ import annotations

import pytest
import torch
from engines import finish
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_samplers.greedy import Greedy

from rwkv_runtime import flight
from rwkv_runtime.engine import Engine
from rwkv_runtime.flight import Reading
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Model
from rwkv_runtime.tokenizer import Tokenizer


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


def test_nothing_is_waited_for_where_the_host_does_the_work() -> None:
    assert flight.reading_on(torch.device("cpu")) is None


@pytest.fixture
def engine(log: list[str], model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """One that reads prompts by 16 tokens, each chunk in a quarter of a second by the device's clock."""
    monkeypatch.setattr("rwkv_runtime.engine.chunk_size", lambda device, waited_for: 16)
    monkeypatch.setattr("rwkv_runtime.engine.reading_on", lambda device: Reading(device, lambda: Event(log)))
    return Engine(model, Eager(), Greedy(), tokenizer)


def test_how_long_a_prompt_took_is_what_the_device_says(engine: Engine) -> None:
    [generation] = finish(engine, Request(tokens_of(41), max_tokens=3))
    times = generation.times
    assert times.prefilled - times.started == pytest.approx(0.75)
    assert engine._readings == {}


@pytest.mark.parametrize("steps", [1, 3])
def test_a_prompt_that_is_given_up_is_forgotten(engine: Engine, steps: int) -> None:
    """In the middle, or after it has been read and before its first token."""
    engine.lag = 1
    generation = engine.submit(Request(tokens_of(41), max_tokens=3))
    for _ in range(steps):
        engine.step()
    assert len(engine._readings) == 1
    engine.cancel(generation)
    assert engine._readings == {}

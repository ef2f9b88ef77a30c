"""--chat: what is remembered, what is not sent to the model, how it is left, and that the state outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import CODE, at_a_terminal, rwkv_run, save_tiny_model, started, wait_for
from click.testing import Result
from helpers import byte_tokenizer

from rwkv_runtime.cli.chat import HELP
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.loading import load
from rwkv_runtime.snapshot import load_snapshot

LENGTH = ["--max-tokens", "12", "--seed", "7"]
ENDLESS = ["--max-tokens", "100000000"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the engine is given; the time of a message with "hurry" is over before it is read."""
    prompts: list[str] = []
    submit = Engine.submit

    def watched(engine: Engine, request: Request) -> object:
        prompts.append(byte_tokenizer().decode(request.prompt))
        return submit(engine, replace(request, seconds=1e-12) if "hurry" in prompts[-1] else request)

    monkeypatch.setattr(Engine, "submit", watched)
    return prompts


def talk(model: Path, said: str | bytes, *args: str) -> Result:
    result = rwkv_run(model, "--chat", *LENGTH, *args, input=said)
    assert result.exit_code == 0, result.output
    return result


def answers(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def state_text(path: Path, model: Path) -> str:
    """What a saved state has read, and what is left for it to read."""
    snapshot = load_snapshot(path, load(model).model)
    return byte_tokenizer().decode((*snapshot.recent, *snapshot.pending))


def test_it_answers_turn_by_turn_and_remembers(tiny: Path) -> None:
    first, second = answers(talk(tiny, "hello\n\nhow are you?\n", "--json"))
    assert (first["prompt"], second["prompt"]) == ("hello", "how are you?")
    assert first["figures"]["prompt_tokens"] == len("User: hello\n\nAssistant:")
    (fresh,) = answers(talk(tiny, "how are you?\n", "--json", "--seed", "8"))
    assert fresh["text"] != second["text"]
    for word in ("/reset", "/clear"):
        assert answers(talk(tiny, f"hello\n{word}\nhow are you?\n", "--json"))[1]["text"] == fresh["text"]


def test_a_message_that_was_not_read_changes_nothing(tiny: Path, tmp_path: Path, seen: list[str]) -> None:
    state = tmp_path / "chat.state"
    said = answers(talk(tiny, "hello\nhurry\nagain\n", "--json", "--save-state", str(state)))
    assert [s["finish"] for s in said] == ["length", "time", "length"]
    assert seen[2] == f" {said[0]['text'].strip()}\n\nUser: again\n\nAssistant:"
    talk(tiny, "hello\nhurry\n", "--save-state", str(state))
    assert state_text(state, tiny) == f"User: hello\n\nAssistant: {said[0]['text'].strip()}"


def test_piped_text_is_taken_as_it_is(tiny: Path, seen: list[str]) -> None:
    talk(tiny, "print('a\\nb')\r\n")
    assert seen == ["User: print('a\\nb')\n\nAssistant:"]


def test_commands_are_not_for_the_model(tiny: Path, seen: list[str]) -> None:
    result = talk(tiny, "/help\n/rest\n/\n/etc/hosts is a file\n/exit\nhello\n", "--quiet")
    unknown = [f"there is no command {word}; {HELP}" for word in ("/rest", "/")]
    assert result.stderr.splitlines() == [HELP, *unknown]
    assert seen == ["User: /etc/hosts is a file\n\nAssistant:"]


def test_a_message_that_is_no_text_is_one_line_and_the_state_is_kept(tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "chat.state"
    result = rwkv_run(tiny, "--chat", *LENGTH, "--quiet", "--save-state", str(state), input=b"hello\nh\xff\n")
    assert (result.exit_code, result.stderr) == (2, "Error: a message is not UTF-8 (byte 2)\n")
    assert state_text(state, tiny).startswith("User: hello\n\nAssistant: ")


@posix
def test_closed_standard_input_is_the_end_of_input(tiny: Path) -> None:
    run = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, "-c", CODE, "--chat", "--model", str(tiny)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@posix
@pytest.mark.parametrize("when", ["answering", "waiting"])
def test_ctrl_c_ends_a_piped_chat_and_its_state_is_saved(tiny: Path, tmp_path: Path, when: str) -> None:
    state = tmp_path / "chat.state"
    length = ENDLESS if when == "answering" else LENGTH
    process = started(tiny, "--chat", "--save-state", str(state), *length)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(5)
    while when == "waiting" and b"ended by length" not in process.stderr.readline():
        continue
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert (b"ended by cancelled" in errors) == (when == "answering")
    assert len(state_text(state, tiny)) > 12


@posix
def test_a_broken_pipe_does_not_lose_the_state(tiny: Path, tmp_path: Path) -> None:
    state = tmp_path / "chat.state"
    process = started(tiny, "--chat", "--save-state", str(state), *ENDLESS)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in errors
    assert state_text(state, tiny).startswith("User: hello\n\nAssistant: ")


@posix
def test_at_a_terminal_ctrl_c_discards_the_line_or_ends_the_answer(tiny: Path) -> None:
    import select

    shown = b""

    def shows(what: bytes, times: int) -> Callable[[], bool]:
        def check() -> bool:
            nonlocal shown
            while select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 65536)
            return shown.count(what) >= times

        return check

    def answers() -> bool:
        shows(b"", 0)()
        return len(shown.partition(b"hello\r\n")[2].strip()) > 20

    with at_a_terminal(tiny, "--chat", *ENDLESS) as (process, ours):
        wait_for(shows(b"User: ", 1), process)
        os.write(ours, b"half a li")
        wait_for(shows(b"half a li", 1), process)
        process.send_signal(signal.SIGINT)
        wait_for(shows(b"User: ", 2), process)
        wait_for(shows(b"/reset or /clear", 2), process)
        os.write(ours, b"hello\n")
        wait_for(shows(b"hello\r\n", 1), process)
        wait_for(answers, process)  # before that, Ctrl-C discards the line
        process.send_signal(signal.SIGINT)
        wait_for(shows(b"ended by cancelled", 1), process)
        wait_for(shows(b"User: ", 3), process)
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
        assert b"prompt 23 tokens" in shown  # the discarded line is no part of the message

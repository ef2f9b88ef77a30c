"""--chat-format: what the model sees of a turn, what the user sees of the answer, and what is remembered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rwkv_runtime import Plugins
from rwkv_runtime.cli import command
from rwkv_runtime.cli.formats import FORMATS
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.testing import byte_tokenizer, tiny_checkpoint

PROMPTS = {
    "world": "User: hello\n\nAssistant:",
    "think": "User: hello\n\nAssistant: <think",
    "think-a-bit": "User: hello think a bit\n\nAssistant: <think",
    "think-a-lot": "User: hello think a lot\n\nAssistant: <think",
    "fake-think": "User: hello\n\nAssistant: <think>\n</think",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    torch.save(tiny_checkpoint(plugins.architectures.get("rwkv7")), folder / "model.pth")
    byte_tokenizer().to_file(folder / "model.vocab.txt")
    return folder / "model.pth"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the engine is given."""
    prompts: list[str] = []
    submit = Engine.submit

    def watched(engine: Engine, request: Request) -> object:
        prompts.append(byte_tokenizer().decode(request.prompt))
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", watched)
    return prompts


def talk(model: Path, form: str | None, *args: str, said: str = "hello\n") -> str:
    options = ["--model", str(model), "--backend", "eager", "--max-tokens", "8", "--seed", "3", *args]
    chosen = ["--chat-format", form] if form else []
    result = CliRunner().invoke(command, ["--chat", *chosen, *options], input=said)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_is_what_is_tested() -> None:
    assert FORMATS.keys() == PROMPTS.keys()


@pytest.mark.parametrize("form", PROMPTS)
def test_the_model_sees_the_format_and_the_user_the_opening(form: str, model: Path, seen: list[str]) -> None:
    shown = talk(model, form)
    written = json.loads(talk(model, form, "--json"))
    assert seen == [PROMPTS[form]] * 2
    assert written["prompt"] == "hello"
    opening = PROMPTS[form].partition("Assistant:")[2].lstrip()
    text = written["text"] if opening else written["text"].lstrip()
    assert shown == f"{opening}{text}\n"


@pytest.mark.parametrize("form", PROMPTS)
def test_the_answer_is_remembered_as_it_stood(form: str, model: Path, seen: list[str]) -> None:
    first, _ = (json.loads(line) for line in talk(model, form, "--json", said="hello\nhello\n").splitlines())
    answer = re.sub(r"\n{2,}", "\n", re.sub(r"\r\n?", "\n", first["text"])).strip()
    space = "" if "<" in PROMPTS[form] else " "
    assert seen[1] == f"{space}{answer}\n\n{PROMPTS[form]}"


def test_world_is_the_default(model: Path, seen: list[str]) -> None:
    talk(model, None)
    assert seen == [PROMPTS["world"]]


def test_an_unknown_format_is_refused_with_the_ones_there_are() -> None:
    result = CliRunner().invoke(command, ["--chat", "--chat-format", "pirate"])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in PROMPTS)

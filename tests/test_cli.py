"""rwkv-run as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from rwkv_runtime import Plugins, Tokenizer
from rwkv_runtime.cli import command
from rwkv_runtime.embedded import OPENING
from rwkv_runtime.loading import load
from rwkv_runtime.snapshot import load_snapshot

LENGTH = ["--max-tokens", "12", "--seed", "7"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a vocabulary of bytes beside it."""
    folder = tmp_path_factory.mktemp("model")
    architecture = Plugins.load().architectures.get("rwkv6")
    tensors = architecture.random(architecture.sizes(2, 64, 257, head_size=32), seed=3)
    tensors["head.weight"][0] = tensors["head.weight"][1:].mean(0)  # end of text is never likely
    save_file(tensors, folder / "tiny.safetensors")
    Tokenizer.from_tokens({b + 1: bytes([b]) for b in range(256)}).to_file(folder / "tiny.vocab.txt")
    return folder / "tiny.safetensors"


@pytest.fixture
def rwkv_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in os.environ if n.startswith("RWKV_")]:
        monkeypatch.delenv(name)

    def call(*args: str, input: str = "", env: dict[str, str] | None = None, model: bool = True) -> Result:
        given = ["--model", str(checkpoint)] if model else []
        return CliRunner().invoke(command, [*args, *given], input=input, env=env)

    return call


def text_of(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_alone_it_writes_a_whole_story(rwkv_run) -> None:
    text = text_of(rwkv_run("--seed", "1", model=False))
    assert text.startswith(OPENING)
    assert text.rstrip().endswith((".", "!", "?", '"'))


def test_a_model_of_one_s_own_begins_with_nothing(rwkv_run) -> None:
    assert json.loads(text_of(rwkv_run("--json", "--max-tokens", "4")))["prompt"] == ""


def test_help_is_shown_without_loading_torch_or_plugins() -> None:
    code = (
        "import sys\nfrom rwkv_runtime.cli import command\n"
        "try: command(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "loaded = {'torch', 'pluggy', 'numpy', 'rwkv_layers'} & set(sys.modules)\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--sampler" in done.stdout


def test_text_goes_to_stdout_and_figures_to_stderr(rwkv_run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured on a busy machine, sampling may seem to take all of a step, and then there is no telling them apart.
    monkeypatch.setattr("rwkv_runtime.batch.Batch.sampling_seconds", lambda batch: 1e-6)
    result = rwkv_run("Once", *LENGTH)
    assert text_of(result).startswith("Once")
    assert "tokens" not in result.stdout
    for figure in ("prompt 4 tokens", "wrote 12 tokens", "without sampling", "first token", "MB", "seed 7", "length"):
        assert figure in result.stderr
    assert rwkv_run("Once", *LENGTH, "--quiet").stderr == ""


def test_the_prompt_comes_from_the_argument_a_file_or_standard_input(rwkv_run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once", encoding="utf-8")
    expected = text_of(rwkv_run("Once", *LENGTH))
    assert text_of(rwkv_run("--file", str(tmp_path / "prompt.txt"), *LENGTH)) == expected
    assert text_of(rwkv_run(*LENGTH, input="Once")) == expected
    assert text_of(rwkv_run("--file", "-", *LENGTH, input="Once")) == expected
    assert text_of(rwkv_run("Once", "--no-echo", *LENGTH)) == expected.removeprefix("Once")


def test_the_same_seed_writes_the_same_text_and_trials_count_seeds_up(rwkv_run) -> None:
    three = [json.loads(line) for line in text_of(rwkv_run("Once", "--trials", "3", "--json", *LENGTH)).splitlines()]
    assert [t["seed"] for t in three] == [7, 8, 9]
    assert len({t["text"] for t in three}) == 3
    assert [t["figures"]["prompt_tokens"] for t in three] == [4, 0, 0]  # read once, not three times
    alone = json.loads(text_of(rwkv_run("Once", "--json", "--max-tokens", "12", "--seed", "8")))
    assert alone["text"] == three[1]["text"]


def test_stop_strings_end_the_text_and_are_not_shown(rwkv_run) -> None:
    full = json.loads(text_of(rwkv_run("Once", "--json", *LENGTH)))["text"]
    stopped = json.loads(text_of(rwkv_run("Once", "--json", "--stop", full[4:6], *LENGTH)))
    assert stopped["text"] == full[: full.index(full[4:6])]
    assert stopped["finish"] == "stop"


def test_sampler_options_come_by_name_or_by_o(rwkv_run) -> None:
    greedy = text_of(rwkv_run("Once", "--sampler", "greedy", *LENGTH))
    assert text_of(rwkv_run("Once", "--temperature", "0", *LENGTH)) == greedy
    assert text_of(rwkv_run("Once", "-o", "top_k", "1", *LENGTH)) == greedy
    assert text_of(rwkv_run("Once", "-o", "top-p", "0", *LENGTH)) == greedy


def test_the_command_line_wins_over_the_environment_over_the_file(rwkv_run, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('max-tokens = 3\nseed = 1\nquiet = true\nstop = "zzz"\n[option]\ntop_k = 5\n', encoding="utf-8")

    def count(*args: str, env: dict[str, str] | None = None) -> int:
        return int(json.loads(text_of(rwkv_run("Once", "--json", "--config", str(config), *args, env=env)))["tokens"])

    assert count() == 3
    assert count(env={"RWKV_RUN_MAX_TOKENS": "4"}) == 4
    assert count("--max-tokens", "5", env={"RWKV_RUN_MAX_TOKENS": "4"}) == 5


def test_a_wrong_name_in_the_file_of_options_is_refused_with_the_nearest_one(rwkv_run, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("max_tokenz = 3\n", encoding="utf-8")
    result = rwkv_run("x", "--config", str(tmp_path / "run.toml"))
    assert result.exit_code == 2
    assert "there is no option 'max_tokenz'; did you mean max-tokens?" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sampler", "nuclues"), "there is no sampler 'nuclues'; did you mean nucleus?"),
        (("--backend", "egaer"), "there is no backend 'egaer'; did you mean eager?"),
        (("-o", "tempreature", "1"), "sampler nucleus has no parameter 'tempreature'; did you mean temperature?"),
        (("--top-p", "1.5"), "top_p is a number from 0 to 1, not 1.5"),
        (("-o", "top_k", "many"), "top_k is a whole number, not 'many'"),
        (("--sampler", "banned", "-o", "banned", "x"), "banned names token ids from 0, and 'x' is none"),
        (("--dtype", "int3"), "there is no dtype 'int3'"),
        (("--device", "cuda:99"), "device 'cuda:99' is not here"),
        (("--device", "toaster"), "there is no device 'toaster'"),
        (("--chat", "hello"), "--chat takes no prompt"),
        (("--prompts", "in.jsonl"), "--prompts needs --output FILE"),
        (("--chat", "--prompts", "in.jsonl"), "exclude each other"),
    ],
)
def test_wrong_values_are_refused_in_one_line_before_the_model_is_loaded(rwkv_run, args, message) -> None:
    result = rwkv_run(*args, "--model", "missing.pth", model=False)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("mode", [(), ("--json",), ("--explain",), ("--chat",), ("--chat", "--json")])
def test_what_only_the_model_can_refuse_is_one_line_and_nothing_else(rwkv_run, mode: tuple[str, ...]) -> None:
    result = rwkv_run(*mode, "--sampler", "banned", "-o", "banned", "999", *LENGTH, input="Once\nTwice\n")
    message = "Error: banned names token ids from 0 to 256, and '999' is none\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


def test_a_missing_model_is_one_line(rwkv_run) -> None:
    result = rwkv_run("x", "--model", "missing.pth", model=False)
    assert (result.exit_code, result.stderr) == (1, "Error: missing.pth: no such file\n")


def test_a_saved_state_goes_on_where_the_text_ended(rwkv_run, tmp_path: Path) -> None:
    state = str(tmp_path / "state.safetensors")
    greedy = ("--sampler", "greedy", "--quiet", "--no-echo")
    whole = text_of(rwkv_run("Once", "--max-tokens", "10", *greedy)).rstrip("\n")
    first = text_of(rwkv_run("Once", "--max-tokens", "4", "--save-state", state, *greedy)).rstrip("\n")
    rest = text_of(rwkv_run("--max-tokens", "6", "--load-state", state, *greedy)).rstrip("\n")
    assert first + rest == whole


def test_a_state_may_have_as_long_a_name_as_a_file_may(rwkv_run, tmp_path: Path) -> None:
    state = tmp_path / ("n" * 255)
    assert rwkv_run("Once", "--max-tokens", "2", "--quiet", "--save-state", str(state)).exit_code == 0
    assert state.is_file()
    refused = rwkv_run("Once", "--save-state", str(state) + "n")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "a file's name is at most 255 bytes long" in refused.stderr


def test_json_loses_no_character_where_output_has_few(checkpoint: Path) -> None:
    runner = CliRunner(charset="ascii")
    result = runner.invoke(command, ["caf\u00e9", "--model", str(checkpoint), "--json", "-n", "1", "-q"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout_bytes.isascii()
    assert json.loads(result.stdout)["prompt"] == "caf\u00e9"


@pytest.mark.parametrize("what", ["plugins", "backends", "samplers"])
def test_tables_show_what_is_installed(rwkv_run, what: str) -> None:
    table = text_of(rwkv_run(f"--{what}", model=False))
    rows = [json.loads(line) for line in text_of(rwkv_run(f"--{what}", "--json", model=False)).splitlines()]
    expected = {"plugins": "rwkv6", "backends": "eager", "samplers": "nucleus"}[what]
    assert expected in [row["name"] for row in rows]
    assert all(row["name"] in table for row in rows)


def test_tables_say_why_a_backend_is_not_usable(rwkv_run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "usable: no: no C++ compiler found" in text_of(rwkv_run("--backends", model=False))


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_cleanly_and_keeps_what_was_written(checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    args = ["Once", "--model", str(checkpoint), "--max-tokens", "1000000", "--save-state", str(state), "--threads", "1"]
    code = "from rwkv_runtime.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    begun = process.stdout.read(40)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert begun.startswith(b"Once")
    assert rest.endswith(b"\n")
    assert b"ended by cancelled" in errors
    assert b"Traceback" not in errors
    model = load(checkpoint, backend="eager")
    saved = load_snapshot(state, model.model)
    _, expected = model.forward(saved.recent)  # the state has read whole tokens, each of them once
    assert len(saved.recent) == saved.position
    assert torch.allclose(saved.state["att_kv"], expected["att_kv"], atol=1e-3)


def test_threads_are_set_when_asked(rwkv_run) -> None:
    before = torch.get_num_threads()
    try:
        text_of(rwkv_run("Once", "--threads", "1", *LENGTH))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)

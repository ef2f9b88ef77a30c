"""Where options come from, and what is refused before a model is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

from rwkv_runtime.cli import command
from rwkv_runtime.cli.checks import read_prompt
from rwkv_runtime.errors import OptionError

MISSING = ["--model", "missing.pth"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The options a command line comes to; nothing is run."""
    options: dict = {}
    monkeypatch.setattr("rwkv_runtime.cli.run.run", options.update)
    for name in [n for n in os.environ if n.startswith("RWKV_")]:
        monkeypatch.delenv(name)
    return options


def invoke(*args: str, **env: str) -> Result:
    return CliRunner().invoke(command, [*args], env={f"RWKV_RUN_{name}": value for name, value in env.items()})


EXAMPLES = {click.Path: "some file", click.IntRange: "3", click.FloatRange: "2.5"}


@pytest.mark.parametrize("option", [p for p in command.params if isinstance(p, click.Option)], ids=lambda p: p.opts[-1])
def test_every_option_can_come_from_its_variable(option: click.Option, seen: dict) -> None:
    if option.name in ("version", "help", "config", "table", "option"):
        pytest.skip("leaves at once, or has a test of its own")
    variable = next(o for o in option.opts if o.startswith("--"))[2:].replace("-", "_").upper()
    kind = "1" if option.is_flag else "world" if isinstance(option.type, click.Choice) else None
    value = kind or EXAMPLES.get(type(option.type), "3" if option.type is click.INT or option.name != "stop" else "a b")
    default = command.make_context("rwkv-run", []).params[option.name]
    value = "0" if option.name == "echo" else value
    assert invoke(**{variable: value}).exit_code == 0
    assert seen[option.name] != default or option.name == "chat_format"


def test_parameters_from_the_variable_may_hold_spaces_and_come_in_pairs(seen: dict) -> None:
    assert invoke(OPTION="top_p 0.5 json_schema 'my schema.json'").exit_code == 0
    assert seen["params"] == {"top_p": "0.5", "json_schema": "my schema.json"}
    for words, reason in (("top_p 0.5 bogus", "pairs of words"), ("top_p '0.5", "as a shell has them: No closing")):
        result = invoke(OPTION=words)
        assert (result.exit_code, reason in result.stderr) == (2, True)


def test_each_parameter_of_the_sampler_comes_from_the_nearest_place(seen: dict, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("temperature = 0.5\n[option]\ntop_p = 0.1\ntop_k = 7\n", encoding="utf-8")
    args = ["--config", str(config), "-o", "temperature", "2"]
    assert invoke(*args, TOP_P="0.3").exit_code == 0
    assert seen["params"] == {"temperature": "2", "top_p": 0.3, "top_k": "7"}


def test_a_parameter_given_twice_in_one_place_must_be_the_same(seen: dict, tmp_path: Path) -> None:
    assert invoke("-o", "top-p", "0.50", "--top-p", "0.5", OPTION="top_p 0.1", TOP_P="0.1").exit_code == 0
    assert seen["params"] == {"top_p": 0.5}
    assert "top_p is given as 0.2 by --top-p and as 0.1 by -o" in invoke(OPTION="top_p 0.1", TOP_P="0.2").stderr
    config = tmp_path / "run.toml"
    config.write_text("temperature = 0.5\n[option]\ntemperature = 1\n", encoding="utf-8")
    assert "temperature is given as 0.5 by" in invoke("--config", str(config)).stderr


def test_what_is_set_for_other_runs_too_is_not_refused_where_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("RWKV_")]:
        monkeypatch.delenv(name)
    result = invoke("--json", *MISSING, CHAT_FORMAT="think", ROWS="2", ECHO="1", OUTPUT="out.jsonl")
    assert (result.exit_code, result.stderr) == (1, "Error: missing.pth: no such file\n")


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["hi"], {"CHAT": "1"}),
        (["--trials", "2"], {"CHAT": "1", "PROMPTS": "in.jsonl", "OUTPUT": "out.jsonl"}),
        (["hi"], {"PROMPTS": "in.jsonl", "OUTPUT": "out.jsonl"}),
        (["--load-state", "."], {"PROMPTS": "in.jsonl", "OUTPUT": "out.jsonl"}),
        (["--chat"], {"TRIALS": "3", "EXPLAIN": "1", "FILE": "prompt.txt", "PROMPTS": "in.jsonl"}),
        (["hi"], {"LOGPROBS": "3", "FILE": "prompt.txt"}),
        (["--json"], {"PROMPTS": "in.jsonl", "OUTPUT": "out.jsonl"}),
        (["--echo"], {"CHAT": "1", "JSON": "1"}),
        (["hi", "--sampler", "greedy"], {"TOP_P": "0.5", "OPTION": "temperature 0.5"}),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_set_elsewhere_gives_way_to_what_is_typed(
    args: list[str], env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("RWKV_")]:
        monkeypatch.delenv(name)
    if "." in args:  # which a run of prompts would not have looked at
        assert "--load-state .: a directory" in invoke(*args, *MISSING, **env).stderr
    else:
        assert invoke(*args, *MISSING, **env).stderr == "Error: missing.pth: no such file\n"


def test_a_parameter_that_no_sampler_has_is_refused_wherever_it_is_set() -> None:
    result = invoke(*MISSING, OPTION="top_q 0.5")
    assert (result.exit_code, "has no parameter 'top_q'" in result.stderr) == (2, True)


def test_a_misspelt_variable_is_named_in_a_warning_with_the_nearest_right_one(seen: dict) -> None:
    result = invoke(MAX_TOKENZ="3", ZZZ="1", JSON="1", TOP_P="0.5")
    assert (result.exit_code, seen["max_tokens"]) == (0, 512)
    assert result.stderr == (
        "warning: no option is set by the variable RWKV_RUN_MAX_TOKENZ (did you mean RWKV_RUN_MAX_TOKENS?), "
        "nor by RWKV_RUN_ZZZ (see rwkv-run --help)\n"
    )
    assert invoke(MAX_TOKENS="3").stderr == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("samplers = true", "there is no option 'samplers'"),
        ("max-token = 3", "there is no option 'max-token'; did you mean max-tokens?"),
        ("model = 5", "model is a text"),
        ("output = true", "output is a text"),
        ("seed = 1.7", "seed is a whole number"),
        ("chat = 3", "chat is true or false"),
        ("stop = [1]", "stop is a text or a list of texts"),
        ("temperature = '1'", "temperature is a number"),
        ("option = 3", "option is a table of names and values"),
        ("not toml", "not TOML"),
        ("seed = " + "9" * 5000, "not TOML"),
    ],
)
def test_a_setting_of_the_wrong_type_in_the_file_is_refused_in_one_line(line, message, seen, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(line, encoding="utf-8")
    result = invoke("--config", str(tmp_path / "run.toml"))
    assert (result.exit_code, message in result.stderr) == (2, True)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--threads", "0"], "'--threads'"),
        (["--stop", ""], "a stop string cannot be empty"),
        (["--nonsense"], "there is no option --nonsense; see rwkv-run --help"),
        (["--max-token", "3"], "there is no option --max-token; did you mean --max-tokens?"),
        (["--max_tokens", "3"], "did you mean --max-tokens?"),
        (["--no-eco"], "did you mean --no-echo?"),
        (["--hlep"], "did you mean --help?"),
        (["-Z"], "there is no option -Z; see rwkv-run --help"),
        (["hi", "there", "--seed", "1"], 'the prompt is one argument; put it in quotes: rwkv-run "hi there"'),
        (["word"] * 400, 'word word word ..."'),
        (["--quant", "int4"], "there is no quantization 'int4'; there is only int8"),
        (["--file", "missing.txt"], "--file missing.txt: no such file"),
        (["--load-state", "missing.state"], "--load-state missing.state: no such file"),
        (["--load-state", __file__], "test_cli_options.py: not a saved state; --save-state FILE makes one"),
        (["--load-state", "."], "--load-state .: a directory"),
        (["--vocab", "."], "--vocab .: a directory"),
        (["--save-state", "missing/x.state"], "its folder is missing"),
        (["--save-state", "."], "not a file that could be replaced"),
        (["--sha256", "zz"], "64 hexadecimal digits"),
        (["--save-state", "-"], "--save-state -: a file is needed; of standard input only --file can read"),
        (["--prompts", "in", "--output", "-"], "--output -: a file is needed"),
        (["--prompts", "-", "--output", "out"], "--prompts -: a file is needed"),
        (["--vocab", ""], "--vocab is empty; give the file's name"),
        (["--sampler", "nucleus,"], "a sampler's name is missing in 'nucleus,'"),
        (["--sampler", "greedy", "--top-p", "0.5"], "sampler greedy has no parameter 'top_p'"),
        (["--chat", "--trials", "2"], "--chat takes no --trials"),
        (["--logprobs", "2"], "--logprobs goes with"),
        (["--chat-format", "think"], "--chat-format goes with --chat"),
        (["--rows", "2"], "--rows goes with --prompts"),
        (["--output", "out.jsonl"], "--output goes with --prompts"),
        (["--chat", "--echo"], "--chat takes no --echo"),
        (["--prompts", "in", "--json"], "--prompts takes no --json"),
        (["--json", "--echo"], "--json takes no --echo"),
        (["-o", "top_p", "0.5", "--top-p", "0.4"], "top_p is given as 0.4 by --top-p and as 0.5 by -o; leave one"),
    ],
)
def test_what_cannot_be_right_is_one_line_before_the_model_is_looked_for(args: list[str], message: str) -> None:
    result = invoke(*args, *MISSING)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("", 2, "--model is empty; give the file's name"),
        (".", 1, ".: a directory; give the .pth or .safetensors file in it"),
    ],
)
def test_a_model_that_cannot_be_one_is_one_line(model: str, status: int, message: str) -> None:
    result = invoke("Once", "--model", model)
    assert (result.exit_code, result.stderr) == (status, f"Error: {message}\n")


def test_the_last_line_end_of_a_file_and_a_byte_order_mark_are_not_part_of_the_prompt(tmp_path: Path) -> None:
    def read(content: bytes) -> str:
        (tmp_path / "prompt.txt").write_bytes(content)
        return read_prompt({"prompt": None, "file": str(tmp_path / "prompt.txt")})

    assert read(b"Once upon a time\n") == read(b"Once upon a time\r\n") == read(b"Once upon a time")
    assert read(b"\xef\xbb\xbfOnce\n\n") == "Once\n"
    with pytest.raises(OptionError, match=r"not UTF-8 \(byte 2\)"):
        read(b"h\xff")


def test_a_dash_reads_standard_input_and_a_closed_one_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=SimpleNamespace(read=lambda: b"piped\n"), isatty=lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_prompt({"prompt": "-", "file": None}) == "piped"
    assert read_prompt({"prompt": None, "file": "-"}) == "piped"
    assert read_prompt({"prompt": None, "file": None}) is None
    monkeypatch.setattr("sys.stdin", None)
    assert read_prompt({"prompt": None, "file": None}) is None


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("after", [0.3, 0.9])
def test_ctrl_c_while_the_model_is_loaded_ends_quietly(after: float) -> None:
    code = "from rwkv_runtime.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == -signal.SIGINT:
        pytest.skip("Python itself had not started yet")
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe")
def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from rwkv_runtime.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "-q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) in (1, 120)

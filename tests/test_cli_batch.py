"""--prompts: a record for every line, whatever the line; what is refused; how a run is taken up again."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from cli_runs import rwkv_run, save_tiny_model, started, wait_for
from click.testing import Result

from rwkv_runtime.cli.lock import lock
from rwkv_runtime.loading import load
from rwkv_runtime.runtime import Runtime

LENGTH = ["--max-tokens", "12", "--seed", "7"]
HELLO = b'"Hello"\n"Once"\n'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = ['"Hello"', '{"prompt": "Once", "id": "a", "max_tokens": 5}', "not json", "", '{"prompt": 3}']
    lines += ['{"prompt": "x", "foo": 1}', '{"prompt": "Tom", "seed": 3, "temperature": 0.5, "stop": ["q"]}']
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def batch(model: Path, source: Path, *args: str, output: Path | None = None) -> Result:
    target = output or source.with_name("out.jsonl")
    return rwkv_run(model, "--prompts", str(source), "--output", str(target), *LENGTH, *args)


def records(path: Path) -> dict[int, dict]:
    def refuse(name: str) -> None:
        raise ValueError(name)

    lines = path.read_bytes().splitlines()
    return {r["line"]: r for r in (json.loads(line.decode(), parse_constant=refuse) for line in lines)}


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_record_for_every_line_and_a_bad_line_costs_only_itself(tiny: Path, prompts: Path) -> None:
    result = batch(tiny, prompts)
    assert result.exit_code == 1
    assert "3 of 6 lines failed" in result.stderr
    found = records(prompts.with_name("out.jsonl"))
    assert sorted(found) == [1, 2, 3, 5, 6, 7]
    assert found[2]["id"] == "a"
    assert found[2]["tokens"] == 5
    assert "not JSON" in found[3]["error"]
    assert "sampler nucleus has no parameter 'foo'" in found[6]["error"]
    alone = json.loads(rwkv_run(tiny, "Hello", "--json", *LENGTH).stdout)
    assert found[1]["text"] == alone["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (rb'"\ud800"', "half of a surrogate pair"),
        (rb'{"prompt": "x", "id": "\udfff"}', "half of a surrogate pair"),
        (rb'{"prompt": "x", "\ud800": 1}', "half of a surrogate pair"),
        (b'"\xff"', "not JSON"),
        (b'"\xed\xa0\x80"', "not JSON"),
        (b'{"prompt": "x", "id": NaN}', "NaN is no number in JSON"),
        (b'{"prompt": "x", "id": [-Infinity]}', "-Infinity is no number in JSON"),
        (b'{"prompt": "x", "id": 1e999}', "not JSON"),
        (b'{"prompt": "x", "id": ' + b"[" * 100000 + b"]" * 100000 + b"}", "not JSON"),
        (b'{"prompt": "x", "seconds": true}', "seconds is a number above 0, not True"),
        (b'{"prompt": "x", "seconds": 0}', "seconds is a number above 0, not 0"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens is a whole number, not True"),
        (b'{"prompt": "x", "top-q": 1}', "has no parameter 'top_q'"),
    ],
)
def test_a_line_that_cannot_be_used_says_why(tiny: Path, tmp_path: Path, line: bytes, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line + b'\n"Hello"\n')
    assert batch(tiny, source).exit_code == 1
    found = records(tmp_path / "out.jsonl")
    assert message in found[1]["error"]
    assert found[2]["tokens"] == 12


def test_one_line_says_what_came_of_it(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(HELLO)
    output = tmp_path / "out.jsonl"
    done = f"2 of 2 lines done; their records are in {output}"
    first = batch(tiny, source, "--backend", "eager").stderr
    assert re.fullmatch(rf"{re.escape(done)} \[wrote 24 tokens, \d+\.\d/s \| eager\]\n", first)
    assert batch(tiny, source).stderr == f"{done}\n"  # nothing was left
    assert batch(tiny, source, "--quiet").stderr == ""
    source.write_bytes(HELLO + b"not json\n")
    assert batch(tiny, source, "--quiet").stderr == f"1 of 3 lines failed; their records in {output} say why\n"


def test_names_may_be_spelt_with_dashes(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = ['{"prompt": "x", "top-p": 0, "max-tokens": 3}', '{"prompt": "x", "top_p": 0, "max_tokens": 3}']
    source.write_text("\n".join(lines), encoding="utf-8")
    assert batch(tiny, source).exit_code == 0
    found = records(tmp_path / "out.jsonl")
    assert found[1]["text"] == found[2]["text"]
    assert found[1]["tokens"] == 3


def test_text_is_written_as_it_is(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf"caf\xc3\xa9 \\ud83d\\ude00"')  # a byte order mark, and a whole pair
    assert batch(tiny, source).exit_code == 0
    assert records(tmp_path / "out.jsonl")[1]["prompt"] == "café 😀"


def test_logprobs_are_part_of_the_records(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(HELLO)
    assert batch(tiny, source, "--logprobs", "3").exit_code == 0
    expected = json.loads(rwkv_run(tiny, "Hello", "--json", "--logprobs", "3", *LENGTH).stdout)["logprobs"]
    found = records(tmp_path / "out.jsonl")[1]["logprobs"]
    assert [(o["token"], len(o["candidates"])) for o in found] == [(o["token"], len(o["candidates"])) for o in expected]


@pytest.mark.parametrize("kept", [1, 9, 20])
def test_an_interrupted_run_is_taken_up_where_it_stopped(tiny: Path, prompts: Path, kept: int) -> None:
    output = prompts.with_name("out.jsonl")
    batch(tiny, prompts)
    whole = records(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:kept])  # killed in the middle of a record
    batch(tiny, prompts)
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    assert records(output) == whole
    assert len(output.read_bytes().splitlines()) == len(whole)


def test_lines_that_failed_in_an_earlier_run_are_counted(tiny: Path, prompts: Path) -> None:
    output = prompts.with_name("out.jsonl")
    batch(tiny, prompts)
    before = output.read_bytes()
    again = batch(tiny, prompts)
    assert (again.exit_code, output.read_bytes()) == (1, before)
    assert "3 of 6 lines failed" in again.stderr
    failed = [line for line in before.splitlines(keepends=True) if b'"error"' in line]
    output.write_bytes(failed[0])
    assert "3 of 6 lines failed" in batch(tiny, prompts).stderr


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"a": 1}', b"[]\n", b'{"line": [], "of": 1}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_bytes(HELLO)
    output.write_bytes(content)
    assert_refused(batch(tmp_path / "missing.pth", source, output=output), "line 1 is not a record of rwkv-run")
    assert output.read_bytes() == content


def test_the_output_of_another_input_is_refused(tiny: Path, prompts: Path) -> None:
    output = prompts.with_name("out.jsonl")
    batch(tiny, prompts)
    before = output.read_bytes()
    prompts.write_text('"Another"\n', encoding="utf-8")
    assert_refused(batch(tiny, prompts), "of another input")
    assert output.read_bytes() == before


def test_files_that_cannot_be_right_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    source, missing = tmp_path / "in.jsonl", tmp_path / "missing.pth"
    source.write_bytes(HELLO)
    (tmp_path / "link.jsonl").hardlink_to(source)
    assert_refused(batch(missing, source, output=source), "the file of --prompts")
    assert_refused(batch(missing, source, output=tmp_path / "link.jsonl"), "the file of --prompts")
    assert_refused(batch(missing, source, output=tmp_path), "a directory")
    assert_refused(batch(missing, source, output=tmp_path / "none" / "out.jsonl"), "there is no folder")
    assert_refused(batch(missing, tmp_path / "none.jsonl"), "No such file")
    assert_refused(batch(missing, tmp_path, output=tmp_path / "out.jsonl"), "write it to a file first")
    assert source.read_bytes() == HELLO
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs, no /dev")
def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    source, missing, fifo = tmp_path / "in.jsonl", tmp_path / "missing.pth", tmp_path / "fifo"
    source.write_bytes(HELLO)
    os.mkfifo(fifo)
    assert_refused(batch(missing, fifo), "write it to a file first")
    assert_refused(batch(missing, Path(os.devnull), output=tmp_path / "out.jsonl"), "write it to a file first")
    assert_refused(batch(missing, source, output=fifo), "not a regular file")
    assert_refused(batch(missing, source, output=source / "out.jsonl"), "Not a directory")
    assert_refused(batch(missing, source, output=Path(os.devnull)), "not a regular file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is unwritable here")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    source, folder = tmp_path / "in.jsonl", tmp_path / "locked"
    source.write_bytes(HELLO)
    folder.mkdir(mode=0o500)
    assert_refused(batch(tmp_path / "missing.pth", source, output=folder / "out.jsonl"), "cannot be written to")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_whole_records_and_the_rest_for_later(tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 3}\nbad\n"Hello"\n"Once"\n', encoding="utf-8")
    args = ["--prompts", str(source), "--output", str(output), "--rows", "2"]
    process = started(tiny, *args, "--max-tokens", "100000000")
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted, 2 of 4 lines done; the same command takes up the rest" in errors
    assert b"Traceback" not in errors
    assert sorted(records(output)) == [1, 2]
    assert "1 of 4 lines failed" in batch(tiny, source).stderr
    assert sorted(records(output)) == [1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_a_run_that_ctrl_c_stopped_comes_to_every_line_once(tiny: Path, tmp_path: Path) -> None:
    source, output, count = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 40
    source.write_text("".join(f'{{"prompt": "text {i}", "id": {i}}}\n' for i in range(count)), encoding="utf-8")
    run = ["--prompts", str(source), "--output", str(output), "--rows", "3", "--max-tokens", "300", "--seed", "7"]

    def written(least: int) -> bool:
        return output.exists() and output.read_bytes().count(b"\n") >= least

    for least in (4, 12):
        process = started(tiny, *run)
        wait_for(partial(written, least), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, b"Traceback" in errors) == (130, False)
    assert not written(count)
    last = started(tiny, *run)
    _, errors = last.communicate(timeout=60)
    assert (last.returncode, b"40 of 40 lines done" in errors) == (0, True)
    found = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert sorted(record["line"] for record in found) == [*range(1, count + 1)]
    assert all((record["id"], record["seed"]) == (record["line"] - 1, record["line"] + 6) for record in found)
    assert {record["finish"] for record in found} <= {"length", "end"}


@pytest.mark.skipif(sys.platform == "win32", reason="kills")
def test_two_runs_do_not_write_one_file_and_a_killed_one_leaves_no_lock(tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 3}\n"Hello"\n', encoding="utf-8")
    args = ["--prompts", str(source), "--output", str(output), "--rows", "1"]
    process = started(tiny, *args, "--max-tokens", "100000000")
    try:
        wait_for(lambda: output.exists() and b"\n" in output.read_bytes(), process)
        assert_refused(batch(tmp_path / "missing.pth", source), "another rwkv-run is writing it")
        assert sorted(records(output)) == [1]
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert batch(tiny, source).exit_code == 0
    assert sorted(records(output)) == [1, 2]


def test_a_second_run_that_comes_while_the_first_loads_its_model_is_refused_too(tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(HELLO)

    def load_slowly(*args: Any, **kwargs: Any) -> Runtime:
        assert lock(other)
        return load(*args, **kwargs)

    with output.open("ab") as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_runtime.cli.run.load", load_slowly)
        assert_refused(batch(tiny, source), "another rwkv-run is writing it")
    assert output.read_bytes() == b""
    assert batch(tiny, source).exit_code == 0


def test_where_nothing_can_be_locked_a_warning_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: IO[bytes]) -> bool:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    source = tmp_path / "in.jsonl"
    source.write_bytes(HELLO)
    (tmp_path / "out.jsonl").touch()
    monkeypatch.setattr("rwkv_runtime.cli.batch.lock", unsupported)
    result = batch(tiny, source)
    assert result.exit_code == 0
    assert result.stderr.count("out.jsonl cannot be locked (Operation not supported)") == 1

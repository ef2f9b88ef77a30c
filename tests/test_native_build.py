"""Compiling on the user's machine: once, out of others' reach, and with a reason where it cannot be done."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import only
from rwkv_backends import native
from rwkv_backends.native import Native, build

import rwkv_runtime
from rwkv_runtime.errors import BackendError
from rwkv_runtime.model import Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv-runtime"


def compiler(tmp_path: Path, script: str, name: str = "cc") -> Path:
    """A compiler of our own, for the variable CC."""
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes CC one that works and notes each start in the file returned."""
    calls = tmp_path / "calls"
    real = build._compiler()
    assert real is not None
    monkeypatch.setenv("CC", str(compiler(tmp_path, f'echo >> {calls}\nexec {real[0]} "$@"')))
    return calls


@only("rwkv6")
def test_it_is_compiled_once(cache: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(tmp_path, monkeypatch)
    for _ in range(3):
        Native().forward(model)
    assert calls.read_text() == "\n"
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_other_options_another_compiler_or_another_processor_make_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(tmp_path, monkeypatch)
    build.library("rwkv6.c", ["-DONE"])
    build.library("rwkv6.c", ["-DTWO"])
    monkeypatch.setattr(build, "_processor", lambda: "another")
    build.library("rwkv6.c", ["-DONE"])
    os.utime(tmp_path / "cc", ns=(1, 1))
    build.library("rwkv6.c", ["-DONE"])
    assert calls.read_text() == "\n" * 4
    assert len(list(cache.iterdir())) == 4


def test_programs_that_start_side_by_side_do_not_disturb_each_other(cache: Path) -> None:
    code = "from rwkv_backends.native import build; print(build.library('rwkv6.c').rwkv6_step is not None)"
    starts = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [start.communicate()[0] for start in starts] == ["True\n"] * 3
    assert len(list(cache.iterdir())) == 1


@only("rwkv6")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo native.c: In function f: >&2; echo native.c:3:1: error: no such thing >&2; exit 1", "no such thing"),
        (
            "echo cc: fatal error: cannot execute cc1 >&2; echo compilation terminated. >&2; exit 1",
            "cannot execute cc1",
        ),
        ("exit 3", "it does not say why"),
        ("exit 0", "it does not say why"),
    ],
)
def test_a_compiler_that_fails_is_one_line_and_the_text_is_written(
    script: str,
    reason: str,
    cache: Path,
    model: Model,
    tokenizer: Tokenizer,
    plugins: Plugins,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = compiler(tmp_path, script)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(BackendError, match=f"^{broken} does not compile: [^\n]*{reason}"):
        Native().forward(model)
    with caplog.at_level(logging.WARNING, "rwkv_runtime"):
        runtime = Runtime(model, tokenizer, plugins, "native")
        assert "".join(runtime.generate("a", max_tokens=3, seed=1))
    assert runtime.backend.name == "eager"
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert list(cache.iterdir()) == []


@only("rwkv6")
def test_a_compiler_that_is_not_there(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    for asked in (None, model):
        assert Native().why_not(asked) == (
            "no C compiler found: there is no no-such-compiler -O2 (from the variable CC); "
            "install one, or name it in the variable CC"
        )
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    reason = "no C compiler found: there is no gcc or clang; install one, or name it in the variable CC"
    assert Native().why_not(model) == reason
    with pytest.raises(BackendError, match="no C compiler found"):
        build.library("rwkv6.c")


def test_a_compiler_with_options(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build._compiler()
    assert real is not None
    monkeypatch.setenv("CC", f"{real[0]} -DNO_BFLOAT16_DOT -g")
    assert build.library("rwkv6.c").rwkv6_step is not None


@only("rwkv6")
def test_a_cache_that_others_may_write_to_is_not_used(cache: Path, model: Model) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(BackendError, match="others may write there; make it yours alone"):
        Native().forward(model)


@only("rwkv6")
def test_a_cache_that_cannot_be_made(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"the compiled code cannot be kept or loaded: .*Not a directory"):
        Native().forward(model)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sys.platform", "win32", "it needs Linux, this is win32"),
        ("platform.machine", lambda: "riscv64", "it has no code for a processor of the kind riscv64"),
    ],
)
def test_machines_there_is_no_code_for(name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name, value)
    assert Native().why_not(None) == reason


@only("rwkv6")
def test_a_torch_without_openmp(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_team", lambda: None)
    assert Native().why_not(None) == "torch has no OpenMP library here, whose threads it would use"
    with pytest.raises(BackendError, match="torch has no OpenMP library here"):
        Native().forward(model)


def test_it_is_what_is_taken_where_nothing_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU another backend is")
    assert rwkv_runtime.load().backend.name == "native"

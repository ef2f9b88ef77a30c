"""The docs are run: what they show works.

A fenced block is treated by its language: `python` is executed (one namespace a page, in a folder of the page's
own), `toml` and `json` are parsed, commands in `console` and `sh` (lines that begin with `$ `) are run. An HTML
comment right above a block changes that:

    <!-- test: file PATH -->      the block is written to that file instead
    <!-- test: skip (REASON) -->  the block is left alone
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from distributions import ROOT, build_wheel, install

from rwkv_runtime import CheckpointError, Plugins
from rwkv_runtime.cli import command
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.testing import byte_tokenizer, tiny_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (test:.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"test: (?:(file) (\S+)|(skip) \((.+)\))")
LANGUAGES = {"python", "toml", "json", "console", "sh", "text"}


class Block(NamedTuple):
    line: int
    language: str
    text: str
    action: str | None  # "file", "skip" or None
    argument: str


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        mark = MARK.fullmatch(match[1] or "")
        assert mark or not match[1], f"not a mark: {match[1]!r}; a skipped block gives its reason in brackets"
        action, argument = (mark[1] or mark[3], mark[2] or mark[4]) if mark else (None, "")
        yield Block(text.count("\n", 0, match.start(3)) + 1, match[2], match[3], action, argument)


class Reader:
    """Does what a page says, in a folder of its own."""

    def __init__(self, folder: Path, environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.environ, self.monkeypatch = folder, environ, monkeypatch
        self.namespace: dict[str, object] = {"__name__": "docs"}

    def read(self, page: Path) -> None:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.action == "file":
                path = self.folder / block.argument
                path.parent.mkdir(exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.action is None:
                self.do(block, f"{page.name}, line {block.line}")

    def do(self, block: Block, place: str) -> None:
        assert block.language in LANGUAGES, f"{place}: unknown language {block.language!r}"
        if block.language == "python":
            lines = "\n" * (block.line - 1)  # so that a traceback shows the page's own line numbers
            exec(compile(lines + block.text, place, "exec"), self.namespace)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language in ("console", "sh"):
            commands = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
            assert commands, f"{place}: no line begins with '$ ', so nothing is tested; mark it as skipped"
            for line in commands:
                self.run(shlex.split(line), f"{place}: {line}")

    def run(self, words: list[str], place: str) -> None:
        environ = dict(self.environ)
        while re.match(r"\w+=", words[0]):
            name, _, environ[name] = words.pop(0).partition("=")
        if words[0] == "rwkv-run":
            result = CliRunner().invoke(command, words[1:], env=environ, catch_exceptions=False)
            assert result.exit_code == 0, f"{place}\n{result.output}"
            assert result.stdout or "--output" in words or "--quiet" in words, f"{place}: nothing was written"
        else:
            assert words[:2] == ["pip", "install"], f"{place}: the test cannot run this; mark it as skipped"
            wheel = build_wheel(self.folder / words[2], self.folder)
            self.monkeypatch.syspath_prepend(str(install([wheel], self.folder / "site")))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with its vocabulary, in the place of whatever model a page speaks of."""
    folder = tmp_path_factory.mktemp("story")
    torch.save(tiny_checkpoint(Plugins.load({"RWKV_PLUGINS": ""}).architectures.get("rwkv6")), folder / "model.pth")
    byte_tokenizer().to_file(folder / "model.vocab.txt")
    return folder / "model.pth"


@pytest.fixture
def reader(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "model.vocab.txt"):
        (tmp_path / name).symlink_to(story.parent / name)
    environ = {"RWKV_RUN_BACKEND": "eager"}
    try:
        embedded_model()
    except CheckpointError:  # the package does not hold its model in this checkout
        environ["RWKV_RUN_MODEL"] = "model.pth"
        monkeypatch.setattr("rwkv_runtime.loading.embedded_model", lambda: story)
    before = set(sys.modules)
    yield Reader(tmp_path, environ, monkeypatch)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_works(page: Path, reader: Reader) -> None:
    reader.read(page)
    assert page.read_text(encoding="utf-8").startswith("# ")


def test_the_tutorial_takes_under_25_lines_of_python() -> None:
    page = (ROOT / "docs" / "tutorial-sampler.md").read_text(encoding="utf-8")
    (module,) = [block.text for block in blocks(page) if block.argument.endswith("my_sampler.py")]
    assert len([line for line in module.splitlines() if line.strip()]) < 25


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_a_block_that_fails_is_told_by_its_page_and_line(reader: Reader, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, problem in {
        "# A\n\n```python\nassert 1 == 2\n```\n": AssertionError,
        "```toml\na = \n```\n": tomllib.TOMLDecodeError,
        "```console\n$ rwkv-run --no-such-option\n```\n": AssertionError,
        "```console\n$ rm -r /\n```\n": AssertionError,
        "```sh\nrwkv-run\n```\n": AssertionError,
        "<!-- test: skip -->\n```python\n```\n": AssertionError,
        "```pyhton\n```\n": AssertionError,
    }.items():
        page.write_text(text)
        with pytest.raises(problem):
            reader.read(page)
    page.write_text("# A\n\n```console\n$ rwkv-run --no-such-option\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 4: rwkv-run --no-such-option\n.*"):
        reader.read(page)

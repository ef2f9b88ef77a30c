"""Options, shared fixtures and the summary of `pytest benchmarks`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, machine
from benchmarks.arena import Arena, Settings
from benchmarks.checkpoints import SIZES
from benchmarks.contestants import PACKAGE, PER_OP, import_package
from benchmarks.summary import lines
from rwkv_runtime import Plugins
from rwkv_runtime.runtime import DTYPES

ARENA = pytest.StashKey[Arena]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rwkv-runtime benchmarks")
    group.addoption("--smoke", action="store_true", help="a tiny model and one round each: does everything still run?")
    group.addoption("--size", action="append", choices=list(SIZES), help="model size; may be repeated [0.1b]")
    group.addoption("--dtype", action="append", choices=list(DTYPES), help="may be repeated [bfloat16]")
    group.addoption("--batch", action="append", type=int, help="rows to decode; may be repeated [1 8]")
    group.addoption("--length", action="append", type=int, help="tokens of a prompt; may be repeated [128 512]")
    group.addoption("--device", help="cpu or cuda [cuda where there is one]")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark makes its session in its own pytest_configure, the last of all
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_enable = True  # the test suite's own settings switch it off
    config.option.benchmark_sort = "name" if config.option.benchmark_sort == "min" else config.option.benchmark_sort
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "min", "stddev", "rounds"]


def settings(config: pytest.Config) -> Settings:
    option, smoke = config.option, config.option.smoke
    device = option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(
        sizes=tuple(option.size or ["tiny" if smoke else "0.1b"]),
        dtypes=tuple(option.dtype or ["bfloat16"]),
        batches=tuple(option.batch or ([1] if smoke else [1, 8])),
        lengths=tuple(option.length or ([33] if smoke else [128, 512])),
        device=torch.device(device),
        smoke=smoke,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen, plugins = settings(metafunc.config), Plugins.load()
    backends = plugins.backends.names()
    values: dict[str, Any] = {
        "size": chosen.sizes,
        "dtype": chosen.dtypes,
        "batch": chosen.batches,
        "length": chosen.lengths,
        "contestant": [*backends, PER_OP, PACKAGE],
        "program": ["eager", PACKAGE] if chosen.smoke else [*backends, PACKAGE],  # compiling takes minutes
        "sampler": plugins.samplers.names(),
        "probe": ceilings.names(chosen.device),
    }
    for name, choices in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choices, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One size after another, so that only one set of weights is in memory; ceilings before all."""

    def key(item: pytest.Item) -> tuple[int, str]:
        callspec = getattr(item, "callspec", None)  # only a parametrized test has one
        params: dict[str, Any] = callspec.params if callspec else {}
        place = -2 if "probe" in params else list(SIZES).index(params["size"]) if "size" in params else -1
        return place, params.get("dtype", "")

    items.sort(key=key)


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Iterator[Arena]:
    chosen = settings(pytestconfig)
    import_package()
    with tempfile.TemporaryDirectory(prefix="rwkv-benchmarks-") as folder:
        arena = Arena(chosen, Path(folder), Plugins.load(), ceilings.Ceilings(chosen.device, chosen.smoke))
        pytestconfig.stash[ARENA] = arena
        yield arena


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["rwkv_runtime"] = {**machine.describe(settings(config).device), "command": command(config)}


def command(config: pytest.Config) -> str:
    """As it was typed, less where the results go."""
    hidden = ("--benchmark-json", "--benchmark-storage", "--benchmark-save", "--rootdir")
    return shlex.join(["pytest", *(arg for arg in config.invocation_params.args if not arg.startswith(hidden))])


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arena = config.stash.get(ARENA, None)
    if arena is None:
        return
    terminalreporter.section("rwkv-runtime: at a glance")
    for line, flagged in lines(arena):
        terminalreporter.write_line(line, red=flagged, bold=flagged)

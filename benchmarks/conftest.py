"""Options, shared fixtures and the summary of `pytest benchmarks`."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ceilings, machine
from benchmarks.arena import Arena, Lineup, Settings
from benchmarks.checkpoints import SIZES
from benchmarks.contestants import TUNED
from benchmarks.entrants import entrants
from benchmarks.package import PACKAGE, import_package, why_no_package
from benchmarks.results import Results
from benchmarks.room import Unavailable
from benchmarks.summary import lines
from rwkv_runtime import Plugins
from rwkv_runtime.settings import DTYPES

ARENA = pytest.StashKey[Arena]()
BEGIN = pytest.StashKey[float]()
SLOW = ("compile", TUNED)
"""Take half a minute, or more, to start: not in a smoke run; the test suite has the first."""
PLAINEST = "eager"
"""The one whose start a smoke run tries."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rwkv-runtime benchmarks")
    group.addoption("--smoke", action="store_true", help="a tiny model and one round each: does everything still run?")
    group.addoption("--architecture", action="append", help="may be repeated [all that are installed]")
    group.addoption("--size", action="append", choices=list(SIZES), help="model size; may be repeated [0.1b]")
    group.addoption("--dtype", action="append", choices=list(DTYPES), help="may be repeated [bfloat16]")
    group.addoption("--batch", action="append", type=int, help="rows to decode; may be repeated [1 8]")
    group.addoption("--length", action="append", type=int, help="tokens of a prompt; may be repeated [128 512]")
    group.addoption("--prompts", action="append", type=int, help="prompts read at once; may be repeated [1]")
    group.addoption("--contestant", action="append", help="who takes part; may be repeated [all]")
    group.addoption("--device", help="cpu or cuda [cuda where there is one]")
    group.addoption("--seconds", type=float, help="no benchmark begins after so many seconds [no limit]")
    group.addoption("--weights", type=Path, metavar="FOLDER", help="keeps the random checkpoints there for more runs")
    group.addoption("--results", type=Path, metavar="FILE", help="adds the results to a JSON file for the report")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark makes its session in its own pytest_configure, the last of all
def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGIN] = time.monotonic()
    config.option.benchmark_enable = True  # the test suite's own settings switch it off
    config.option.benchmark_sort = "name" if config.option.benchmark_sort == "min" else config.option.benchmark_sort
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "min", "stddev", "rounds"]


def settings(config: pytest.Config, plugins: Plugins) -> Settings:
    option, smoke = config.option, config.option.smoke
    device = torch.device(option.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = list(entrants(plugins, tune=not smoke))
    if unknown := set(option.contestant or ()) - set(known):
        raise pytest.UsageError(f"there is no contestant {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    everyone = [name for name in known if not smoke or name not in SLOW]
    return Settings(
        architectures=tuple(option.architecture or plugins.architectures.names()),
        sizes=tuple(option.size or ["tiny" if smoke else "0.1b"]),
        dtypes=tuple(option.dtype or ["bfloat16"]),
        batches=tuple(option.batch or ([2] if smoke else [1, 8])),
        lengths=tuple(option.length or ([33] if smoke else [128, 512])),
        prompts=tuple(option.prompts or ([2] if smoke else [1])),
        contestants=tuple(option.contestant or everyone),
        device=device,
        smoke=smoke,
        keep_weights=option.weights is not None,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plugins = Plugins.load()
    chosen = settings(metafunc.config, plugins)
    backends = [name for name in chosen.contestants if name in plugins.backends.names()]
    programs = [name for name in ([PLAINEST] if chosen.smoke else backends) + [PACKAGE] if name in chosen.contestants]
    values: dict[str, Any] = {
        "architecture": chosen.architectures,
        "size": chosen.sizes,
        "dtype": chosen.dtypes,
        "batch": chosen.batches,
        "length": chosen.lengths,
        "prompts": chosen.prompts,
        "contestant": chosen.contestants,
        "backend": backends,
        "program": programs,
        "sampler": plugins.samplers.names(),
        "probe": ceilings.names(chosen.device, chosen.dtypes),
    }
    for name, choices in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choices, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One set of weights after another, so that only one is in memory; ceilings before all."""

    def key(item: pytest.Item) -> tuple[int, str, str]:
        callspec = getattr(item, "callspec", None)  # only a parametrized test has one
        params: dict[str, Any] = callspec.params if callspec else {}
        place = -2 if "probe" in params else list(SIZES).index(params["size"]) if "size" in params else -1
        return place, params.get("architecture", ""), params.get("dtype", "")

    items.sort(key=key)


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.option.seconds
    if limit and time.monotonic() - item.config.stash[BEGIN] > limit:
        pytest.skip(f"the {limit:.0f} seconds are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Whatever has no room, or whoever cannot run here, is skipped with the reason."""
    try:
        return (yield)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Iterator[Arena]:
    plugins = Plugins.load()
    chosen = settings(pytestconfig, plugins)
    if chosen.smoke:
        torch.set_num_threads(1)  # on a busy machine threads wait for each other, tens of times as long as they work
    about = machine.describe(chosen.device)
    about["rwkv_package"] = why_no_package() or import_package(chosen.device)
    results = Results(pytestconfig.option.results, about, command(pytestconfig))
    with tempfile.TemporaryDirectory(prefix="rwkv-benchmarks-") as temporary:
        folder = pytestconfig.option.weights or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        limits = ceilings.Ceilings(chosen.device, chosen.smoke)
        arena = Arena(chosen, folder, plugins, limits, results)
        pytestconfig.stash[ARENA] = arena
        yield arena


@pytest.fixture
def lineup(arena: Arena, architecture: str, size: str, dtype: str) -> Lineup:
    try:
        return arena.lineup(architecture, size, dtype)
    except Unavailable as reason:
        pytest.skip(str(reason))


def command(config: pytest.Config) -> str:
    """As it was typed, less what does not change the figures: where files go, and when to stop."""
    hidden = ("--results", "--weights", "--seconds", "--rootdir", "--benchmark-json")
    kept: list[str] = []
    typed = [str(arg) for arg in config.invocation_params.args]
    for before, arg in zip(["", *typed], typed, strict=False):
        if before not in hidden and arg.partition("=")[0] not in hidden:
            kept.append(arg)
    return shlex.join(["pytest", *kept])


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arena = config.stash.get(ARENA, None)
    if arena is None:
        return
    terminalreporter.section("rwkv-runtime: at a glance")
    for line, flagged in lines(arena):
        terminalreporter.write_line(line, red=flagged, bold=flagged)

"""Python's search for garbage, which has nothing to find in what a process imports and loads."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from rwkv_runtime import collector
from rwkv_runtime.cli import command


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def test_there_is_no_search_inside() -> None:
    with collector.at_rest():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_who_had_none_before_has_none_after() -> None:
    gc.disable()
    with collector.at_rest():
        pass
    assert not gc.isenabled()


def test_what_lasts_is_not_looked_at_again() -> None:
    with collector.lasting():
        made = [[] for _ in range(1000)]
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(made)
    assert not any(found is made[0] for found in gc.get_objects())


def test_garbage_that_comes_later_is_found() -> None:
    with collector.lasting():
        pass
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() >= 1


def test_what_fails_leaves_it_as_it_was() -> None:
    with pytest.raises(KeyError), collector.lasting():
        raise KeyError
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


def test_rwkv_run_has_what_it_imports_and_what_it_loads_last(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(frozen)))
    assert CliRunner().invoke(command, ["Once", "--device", "cpu", "-n", "1", "-q"]).exit_code == 0
    assert len(frozen) == 2


def test_what_rwkv_run_has_made_is_not_looked_at_again() -> None:
    code = (
        "import gc, sys; from rwkv_runtime.cli import command;"
        "command(['Once', '-n', '1', '-q', '--device', 'cpu'], standalone_mode=False)"
    )
    watched = f"import atexit, gc; atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count())); {code}"
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=False)
    enabled, frozen = done.stdout.splitlines()[-1].split()
    assert enabled == "True"
    assert int(frozen) > 100_000  # torch alone

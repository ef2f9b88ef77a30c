"""Real distributions, built, installed and discovered: good ones are offered, bad ones are reported and do no harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributions import EXAMPLE, build_wheel, install, run_python, write_project

BACKEND = """
from functools import partial
from rwkv_runtime import Backend, hookimpl

class Twin(Backend):
    name = "twin"

    def forward(self, model):
        return partial(model.architecture.forward, model.architecture.ops, model.weights)

@hookimpl
def rwkv_backends():
    return [Twin()]
"""
SAMPLER = """
from rwkv_runtime import Sampler, hookimpl

class Mine(Sampler):
    name = "{name}"

@hookimpl
def {hook}():
    {body}
"""
PROJECTS = {
    "good-backend": BACKEND,
    "missing-import": "import a_library_that_is_not_here\n"
    + SAMPLER.format(name="x", hook="rwkv_samplers", body="pass"),
    "clashing-name": SAMPLER.format(name="nucleus", hook="rwkv_samplers", body="return [Mine()]"),
    "misspelt-hook": SAMPLER.format(name="lost", hook="rwkv_sampler", body="return [Mine()]"),
    "raising-hook": SAMPLER.format(name="late", hook="rwkv_samplers", body="raise RuntimeError('no licence found')"),
}
REASONS = {
    "missing-import": "cannot be imported: ModuleNotFoundError: No module named 'a_library_that_is_not_here'",
    "clashing-name": "sampler 'nucleus' is already offered by nucleus (rwkv-runtime)",
    "misspelt-hook": "it implements an unknown hook 'rwkv_sampler'; did you mean rwkv_samplers?",
    "raising-hook": "its hook raised RuntimeError: no licence found",
}
LIST = """
import json
from rwkv_runtime import Plugins
plugins = Plugins.load()
third = [p for p in plugins.plugins if p.distribution != "rwkv-runtime"]
print(json.dumps({
    "offers": {p.name: p.offers for p in third if not p.problem},
    "problems": {p.name: p.problem for p in plugins.broken()},
    "versions": [f"{p.distribution} {p.version}" for p in third],
    "samplers": plugins.samplers.names(),
    "backends": plugins.backends.names(),
    "warning": plugins.warning(),
}))
"""
WRITE = """
from rwkv_runtime.testing import tiny_model
model = tiny_model(backend="twin")
assert model.backend.name == "twin"
texts = [model.generate_batch(["Hi", "Ho"], sampler=s, max_tokens=8, seed=1, top_a=1.0) for s in ("top-a", "top-a")]
assert texts[0] == texts[1] and all(texts[0])
print(len(texts[0]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them installed."""
    folder = tmp_path_factory.mktemp("plugins")
    projects = [EXAMPLE, *(write_project(folder, name, source) for name, source in PROJECTS.items())]
    return install([build_wheel(project, folder) for project in projects], folder / "site")


@pytest.fixture(scope="module")
def found(site: Path) -> dict:
    return json.loads(run_python(LIST, site))


def test_good_third_party_plugins_are_offered_beside_the_built_in_ones(found):
    assert found["offers"] == {"top-a": {"sampler": ["top-a"]}, "good-backend": {"backend": ["twin"]}}
    assert {"nucleus", "greedy", "top-a"} <= {*found["samplers"]}
    assert {"eager", "script", "twin"} <= {*found["backends"]}
    assert {"rwkv-sampler-top-a 0.1.0", "good-backend 1.2", "raising-hook 1.2"} <= {*found["versions"]}


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_plugin_is_reported_with_its_reason(found, name):
    assert found["problems"][name] == REASONS[name]


def test_broken_plugins_leave_nothing_behind_and_are_one_warning(found):
    assert not {"x", "lost", "late"} & {*found["samplers"]}
    assert found["samplers"].count("nucleus") == 1
    assert found["warning"].startswith("4 plugins left out: ")
    assert "\n" not in found["warning"]
    assert all(f"{name}: {reason}" in found["warning"] for name, reason in REASONS.items())


def test_text_is_written_with_a_third_party_sampler_and_backend_beside_broken_ones(site):
    assert run_python(WRITE, site) == "2\n"


def test_the_example_passes_its_own_tests_once_it_is_installed(site):
    code = f"import pytest, sys; sys.exit(pytest.main(['-p', 'no:cacheprovider', '-rs', {str(EXAMPLE / 'tests')!r}]))"
    output = run_python(code, site, {"PYTHONDONTWRITEBYTECODE": "1"})
    assert "......" in output
    assert "SKIPPED" not in output


def test_a_variable_admits_only_the_named_third_party_plugins(site):
    found = json.loads(run_python(LIST, site, {"RWKV_PLUGINS": "top-a, raising-hook"}))
    assert found["offers"] == {"top-a": {"sampler": ["top-a"]}}
    assert found["problems"] == {"raising-hook": REASONS["raising-hook"]}
    assert {"nucleus", "greedy"} <= {*found["samplers"]}


def test_an_empty_variable_admits_no_third_party_plugin_and_runs_none_of_their_code(site):
    found = json.loads(run_python(LIST, site, {"RWKV_PLUGINS": ""}))
    assert (found["offers"], found["problems"], found["warning"]) == ({}, {}, None)

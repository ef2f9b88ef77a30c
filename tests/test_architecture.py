"""The seams, held by reading the source: who imports whom, what importing costs, what every hook must have."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import rwkv_runtime
from rwkv_runtime import hooks

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "rwkv_runtime"
PLUGINS = ROOT / "plugins"
BUILT_IN = {folder.name for folder in PLUGINS.iterdir() if (folder / "__init__.py").exists()}
LEVELS = (
    {"collector", "driver", "errors", "hooks"},
    {"mapped", "memory", "noise", "state", "text", "tokenizer"},
    {"ahead", "controls", "model", "vocabulary"},
    {"backend", "beginning", "blank", "checkpoint", "sampler"},
    {"embedded", "observation", "plugins", "snapshot"},
    {"batch", "generation", "settings"},
    {"flight"},
    {"engine"},
    {"runtime"},
    {"loading"},
)
"""A module imports from lower levels only. What is not named here (`cli`, `testing`) is above them all."""
HOOKS = [name for name in vars(hooks) if name.startswith("rwkv_")]


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every import that runs, as (module, names); those for type checkers alone are left out."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            yield node.module or "", tuple(alias.name for alias in node.names)
        todo += ast.iter_child_nodes(node)


def module_of(path: Path) -> str:
    """First part of a core module's name: `engine`, `cli`, or "" for the package itself."""
    first = path.relative_to(CORE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def core_imports(path: Path) -> set[str]:
    """The core modules that a file imports."""
    found = set()
    for module, names in imports(path):
        package, _, rest = module.partition(".")
        if package == "rwkv_runtime":
            found |= {rest.split(".")[0]} if rest else {*names}
    return found


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_a_core_module_imports_from_lower_levels_only(level):
    allowed = {"__version__"}.union(*LEVELS[:level])
    for module in LEVELS[level]:
        path = CORE / f"{module}.py"
        above = core_imports(path) - allowed if path.exists() else set()
        assert not above, f"{module}.py imports {above}, which is not below it"


def test_every_level_names_modules_that_exist():
    missing = {name for level in LEVELS for name in level if not (CORE / f"{name}.py").exists()}
    assert not missing


def test_the_core_never_imports_a_plugin():
    for path in CORE.rglob("*.py"):
        packages = {module.split(".")[0] for module, _ in imports(path)}
        assert not packages & BUILT_IN, f"{path.name} imports {packages & BUILT_IN}"


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda path: str(path.relative_to(PLUGINS)))
def test_a_built_in_plugin_imports_public_names_only(path):
    for module, names in imports(path):
        if module.split(".")[0] == "rwkv_runtime":
            assert module == "rwkv_runtime", f"it reaches into {module}"
            assert set(names) <= {*rwkv_runtime.__all__}, f"{names} are not all public"


def test_public_names_are_there_and_in_the_order_of_their_modules():
    assert list(rwkv_runtime.__all__) == [name for names in rwkv_runtime._HOME.values() for name in names]
    for home, names in rwkv_runtime._HOME.items():
        module = import_module(f"rwkv_runtime.{home}")
        assert all(getattr(rwkv_runtime, name) is getattr(module, name) for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'Enginee'"):
        rwkv_runtime.Enginee  # noqa: B018


@pytest.mark.parametrize("module", ["rwkv_runtime", "rwkv_runtime.hooks", "rwkv_runtime.cli"])
def test_importing_what_every_start_needs_loads_no_torch(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_everything_prints_nothing_and_changes_no_torch_setting():
    modules = [f"rwkv_runtime.{path.stem}" for path in CORE.glob("[a-z]*.py")] + ["rwkv_runtime.testing"]
    modules += [".".join(path.relative_to(PLUGINS).with_suffix("").parts) for path in PLUGINS.glob("*/[a-z]*.py")]
    code = f"""
import torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().sum(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark)
before = settings()
from importlib import import_module
for module in {modules!r}:
    import_module(module)
assert settings() == before, (before, settings())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_docstring_a_page_and_a_test(hook):
    assert getattr(hooks, hook).__doc__
    page = (ROOT / "docs" / "hooks" / f"{hook}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {hook}\n")
    assert f"hooks/{hook}.md" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    tests = (ROOT / "tests" / "test_plugins.py").read_text(encoding="utf-8")
    assert re.search(rf"def test_\w*{hook}\w*\(", tests)


def test_there_are_three_hooks():
    assert HOOKS == ["rwkv_architectures", "rwkv_backends", "rwkv_samplers"]

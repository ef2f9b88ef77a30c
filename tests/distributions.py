"""Builds plugin distributions and installs them where only the tests see them. Nothing is fetched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "rwkv-sampler-top-a"
PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.2"

[project.entry-points.rwkv_runtime]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]
"""


def write_project(folder: Path, name: str, source: str) -> Path:
    """A project of one module with one entry point of the distribution's name."""
    module = name.replace("-", "_")
    project = folder / name
    project.mkdir()
    (project / "pyproject.toml").write_text(PYPROJECT.format(name=name, module=module))
    (project / f"{module}.py").write_text(source)
    return project


def build_wheel(project: Path, out: Path) -> Path:
    """Builds a project as `pip wheel` does, with the hatchling that is here."""
    before = set(out.glob("*.whl"))
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=project)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


def install(wheels: Iterable[Path], site: Path) -> Path:
    """Installs wheels into a folder of their own, which goes on the path of whoever wants to see them."""
    names = [str(wheel) for wheel in wheels]
    flags = ["--target", str(site), "--upgrade", "--no-deps", "--no-index", "--no-compile", "--quiet"]
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *flags, *names])
    return site


def run_python(code: str, site: Path, environ: Mapping[str, str] | None = None) -> str:
    """What the code prints in a fresh interpreter that sees `site`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RWKV_")}
    paths = os.pathsep.join(filter(None, [str(site), clean.get("PYTHONPATH")]))
    return _run([sys.executable, "-c", code], env={**clean, "PYTHONPATH": paths, **(environ or {})})


def _run(command: list[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout

"""The C of this folder compiled on the user's machine, at first use, for the very processor it runs on.

What comes out is kept in the user's cache under a name made of all that went in: another source, other options,
another compiler or another processor make another file. Nothing but the file's name decides, and a file appears
under its name only when it is whole, so that programs that start side by side do not disturb each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rwkv_runtime import BackendError

SOURCES = Path(__file__).parent
MACHINES = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
"""The processors there is code for, and what tells a compiler to use all that this one can do."""
OPTIONS = ("-std=gnu11", "-O2", "-ftree-vectorize", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared")
SECONDS = 120


def why_not() -> str | None:
    """None where this machine can compile and run the code, otherwise the reason."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    if platform.machine() not in MACHINES:
        return f"it has no code for a processor of the kind {platform.machine()}"
    if _compiler() is None:
        named = os.environ.get("CC")
        wanted = f"{named} (from the variable CC)" if named else "gcc or clang"
        return f"no C compiler found: there is no {wanted}; install one, or name it in the variable CC"
    return None


def library(source: str, options: Sequence[str] = ()) -> ctypes.CDLL:
    """The compiled `source`, a file of this folder; compiled where the cache does not have it. Raises BackendError."""
    compiler = _compiler()
    if compiler is None:
        raise BackendError(str(why_not()))
    command = [*compiler, *OPTIONS, MACHINES[platform.machine()], *options, str(SOURCES / source)]
    try:
        folder = cache_folder()
        path = folder / f"{Path(source).stem}-{_fingerprint(compiler[0], command)}.so"
        if not path.exists():
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"the compiled code cannot be kept or loaded: {error}") from error


def cache_folder() -> Path:
    """The user's own folder for compiled code, made where it is missing. Raises BackendError, OSError."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "rwkv-runtime"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # what lies there is run
        raise BackendError(f"{folder}: others may write there; make it yours alone (chmod 700)")
    return folder


def _compiler() -> list[str] | None:
    """The command that starts the compiler, by its full path."""
    for name in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return None


def _fingerprint(compiler: str, command: Sequence[str]) -> str:
    """Of everything the result depends on. Size and time of the compiler's file stand for its version; the source
    is the command's last word."""
    binary = Path(compiler).resolve().stat()
    parts = [*command, str(binary.st_size), str(binary.st_mtime_ns), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in [Path(command[-1]), *sorted(SOURCES.glob("*.[ch]"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What this processor is and can do: a cache may be shared between machines."""
    kept = ("model name", "flags", "CPU part", "Features")
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read().split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))


def _compile(command: Sequence[str], path: Path) -> None:
    """Raises BackendError with the compiler's first error."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, errors="replace", timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise BackendError(f"{command[0]} does not compile: it takes longer than {SECONDS} s") from None
        if done.returncode != 0 or not made.exists():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            told = next((line for line in lines if "error" in line), lines[0] if lines else "it does not say why")
            raise BackendError(f"{command[0]} does not compile: {told}")
        made.replace(path)

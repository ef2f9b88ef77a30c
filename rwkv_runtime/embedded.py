"""The story model that comes with the package."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

from rwkv_runtime.errors import CheckpointError

OPENING = "Once upon a time"
"""What `rwkv-run` gives the story model where it is given nothing: left to itself the model mostly begins long stories,
which the budget of tokens cuts off; after these words it writes short ones with an end."""
MANIFEST = "story.json"
REINSTALL = "reinstall with: pip install --force-reinstall --no-deps rwkv-runtime"


def embedded_model(folder: Path | None = None) -> Path:
    """Path of the embedded checkpoint; its vocabulary lies beside it.

    Raises CheckpointError for a file that is missing or not the one that was shipped, saying which, what was
    expected and how to reinstall.
    """
    folder = folder or Path(str(files("rwkv_runtime"))) / "data"
    manifest = folder / MANIFEST
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{manifest}: the embedded model's list of files is missing or damaged; {REINSTALL}"
        ) from None
    for name, (size, sha256) in expected.items():
        _check(folder / name, size, sha256)
    return folder / "story.safetensors"


def _check(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the embedded model needs it ({size:,} bytes); {REINSTALL}")
    actual = path.stat().st_size
    if actual != size:
        raise CheckpointError(f"{path}: damaged: {actual:,} bytes, expected {size:,}; {REINSTALL}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is {digest}, expected {sha256}; {REINSTALL}")

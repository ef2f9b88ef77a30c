"""Where a text stands, to go on from later: in memory, or in a file."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_runtime.checkpoint import MAX_INDEX, read_safetensors
from rwkv_runtime.errors import CheckpointError, StateError
from rwkv_runtime.model import Model
from rwkv_runtime.state import State

KIND = "rwkv-runtime state"
FORMAT = f"{KIND} 1"
RECENT = 4096


@dataclass(frozen=True)
class Snapshot:
    """One row of state that has read all but the `pending` tokens, and how many tokens it has read.

    `recent` are the last tokens it has read, for samplers that look back: at most RECENT of them.
    """

    state: State
    pending: tuple[int, ...]
    position: int
    recent: tuple[int, ...] = ()


def save_snapshot(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file, whole or not at all. Raises StateError where it cannot be written."""
    from safetensors.torch import save

    path = Path(path)
    metadata = {
        "format": FORMAT,
        "architecture": snapshot.state.architecture,
        "position": str(snapshot.position),
        "pending": json.dumps(snapshot.pending),
        "recent": json.dumps(snapshot.recent),
    }
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in snapshot.state.tensors.items()}
    part = path.with_name(f"{path.name[:50]}.{os.getpid()}.part")  # a name may be as long as the system allows
    try:
        part.write_bytes(save(tensors, metadata))
        os.replace(part, path)
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load_snapshot(path: str | os.PathLike[str], model: Model) -> Snapshot:
    """Reads what `save_snapshot` wrote, onto the model's device and into its types.

    Raises StateError where the file is missing or damaged, or of another architecture or size.
    """
    path = Path(path)
    check_snapshot(path)
    try:
        tensors, metadata = read_safetensors(path)
    except CheckpointError as error:
        raise StateError(str(error)) from None
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path}: saved by another version (its format is not {FORMAT!r}); save it again")
    try:
        state = _placed(State(tensors, architecture=metadata.get("architecture", "")), model)
        return Snapshot(state, *_place_in_text(metadata, model.config.vocab_size))
    except StateError as error:
        raise StateError(f"{path}: {error}") from None


def check_snapshot(path: str | os.PathLike[str]) -> None:
    """Raises StateError for what is no saved state at all, whatever else it is; needs no model."""
    path = Path(path)
    if not path.is_file():  # opening a pipe could block for ever
        what = "a directory" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise StateError(f"{path}: {what}")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_INDEX))
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}") from None
    if f'"{KIND} '.encode() not in header:
        raise StateError(f"{path}: not a saved state; --save-state FILE makes one")


def _placed(loaded: State, model: Model) -> State:
    state = model.new_state()
    state.check(loaded)
    for name, t in loaded.tensors.items():
        if t.shape[1] != 1:
            raise StateError(f"a state of {t.shape[1]} texts; one is expected")
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise StateError(f"the state's {name!r} is damaged: it is {t.dtype}")
    state.copy(loaded, 0, 0)
    for name, t in state.tensors.items():
        finite = all(bool(torch.isfinite(read).all()) for read in (loaded[name], t))  # 16 bits hide infinity
        if not loaded[name].is_floating_point() or not finite:
            raise StateError(f"the state's {name!r} is damaged: not finite, or not {t.dtype}")
    return state


def _place_in_text(metadata: dict[str, str], vocab_size: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The pending tokens, the position and the recent tokens."""
    try:
        pending, position, recent = (json.loads(metadata[name]) for name in ("pending", "position", "recent"))
    except (KeyError, ValueError, RecursionError):
        raise StateError("a damaged state: its pending tokens or its position are missing") from None
    if type(position) is not int or not 0 <= position < 1 << 62:
        raise StateError("a damaged state: its position is not a whole number from 0")
    for name, tokens in (("pending", pending), ("recent", recent)):
        if type(tokens) is not list or not all(type(t) is int and 0 <= t < vocab_size for t in tokens):
            raise StateError(f"a damaged state: its {name} tokens are not ids from 0 to {vocab_size - 1}")
    return tuple(pending), position, tuple(recent[-RECENT:])

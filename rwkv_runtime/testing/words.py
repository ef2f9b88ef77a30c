"""How findings are worded."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import Tensor


def describe(t: Tensor) -> str:
    """Dtype and shape."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def reason(error: BaseException) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def author_line(error: BaseException) -> str:
    """Where in the author's own file an error came from."""
    others = Path(__file__).parents[1], Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not any(folder in path.parents for folder in others):
            return f" [{path.name}, line {frame.lineno}: {frame.line}]"
    return ""

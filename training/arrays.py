"""Token arrays as files: ``.npy`` inside ``.xz``, since text of 12-bit tokens packs well."""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import numpy.typing as npt


def save_tokens(path: Path, tokens: npt.NDArray[np.uint16]) -> None:
    """Write an array as ``.npy.xz``; the filter is set for two-byte values."""
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 1, "pb": 1}]
    path.write_bytes(lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters))


def load_tokens(path: Path) -> npt.NDArray[np.uint16]:
    """Read an array that :func:`save_tokens` wrote."""
    tokens: npt.NDArray[np.uint16] = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
    return tokens

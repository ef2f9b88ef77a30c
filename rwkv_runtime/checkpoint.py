"""Files -> tensors -> Model: memory-mapped, checked, and never running code from a file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_runtime.ahead import Ahead
from rwkv_runtime.errors import CheckpointError, OptionError
from rwkv_runtime.memory import keep_freed_memory
from rwkv_runtime.model import Architecture, Model, ModelConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_INDEX = 64 << 20  # bytes of a pickle or a safetensors header; real ones take well under one megabyte
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def open_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth` (zip) or `.safetensors` file, memory-mapped on the CPU.

    Which of the two it is, is read from the file, not from its name. Raises CheckpointError.
    """
    path = Path(path)
    size = check_file(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        tensors = _open_zip(path)
    elif size > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        tensors, _ = read_safetensors(path)
    elif head[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: a bare pickle, which could run code; save the weights with a current torch.save or as safetensors"
        )
    else:
        raise CheckpointError(f"{path}: not a checkpoint; a .pth or .safetensors file with RWKV weights is expected")
    return _check_tensors(path, size, tensors)


def check_file(path: str | os.PathLike[str]) -> int:
    """Its size in bytes. Raises CheckpointError for what cannot be a checkpoint: it is missing, say, or empty."""
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: a directory; give the .pth or .safetensors file in it")
        size = path.stat().st_size
        if not path.is_file():  # opening a pipe could block for ever
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name with a null byte
        raise CheckpointError(f"{str(path)!r}: cannot be read: {error}") from None
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; was the download interrupted?")
    return size


def _open_zip(path: Path) -> Mapping[str, object]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [archive.read(e) for e in entries if e.filename.endswith("/byteorder") and e.file_size < 16]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(f"{path}: truncated or damaged (its zip directory is missing); fetch it again") from None
    index = [e for e in entries if e.filename.endswith("/data.pkl")]
    if len(index) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
    if index[0].file_size > MAX_INDEX or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise CheckpointError(f"{path}: not a checkpoint as torch.save writes it (compressed, or its index is huge)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the file holds; a bad one costs one line, below
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: its pickle asks for more than tensors, which could run code; refused. "
            "Save the state dict alone, or as safetensors"
        ) from None
    except Exception as error:  # torch raises a dozen types for damaged archives
        raise CheckpointError(f"{path}: truncated or damaged ({_first_line(error)}); fetch it again") from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    if any(order != sys.byteorder.encode() for order in orders):  # turned round where they lie: no longer the file's
        return {name: t.clone() if isinstance(t, Tensor) else t for name, t in loaded.items()}
    return loaded


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The memory-mapped tensors and the metadata of a safetensors file. Raises CheckpointError."""
    path = Path(path)
    size = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_INDEX, size - 8):
            raise CheckpointError(f"{path}: truncated or damaged (its header is longer than the file); fetch it again")
        try:
            header = json.loads(file.read(length))
            end = max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise CheckpointError(f"{path}: its safetensors header is damaged; fetch it again") from None
    if isinstance(end, int) and size < 8 + length + end:
        raise CheckpointError(f"{path}: truncated: {size:,} bytes of {8 + length + end:,}; fetch it again")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            return tensors, file.metadata() or {}
    except (SafetensorError, RuntimeError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: its safetensors header is damaged ({_first_line(error)})") from None


def _check_tensors(path: Path, size: int, loaded: Mapping[str, object]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, t in loaded.items():
        if not isinstance(name, str) or not isinstance(t, Tensor):
            hint = f"{name!r} is a {type(t).__name__}"
            raise CheckpointError(f"{path}: not a dictionary of tensors ({hint}); save the state dict alone")
        if not name.isprintable():
            raise CheckpointError(f"{path}: not a checkpoint (it has a tensor called {name!r:.80})")
        if t.is_nested or t.layout != torch.strided or t.device.type != "cpu" or t.dtype not in FLOATS:
            kind = str(t.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: tensor {name} is {kind}; dense float32, bfloat16 or float16 is expected")
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():  # a stride of 0 claims any size for free
            raise CheckpointError(f"{path}: tensor {name} claims {list(t.shape)}, more than the file holds")
        tensors[name] = t.detach()
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 2 * size:
        raise CheckpointError(f"{path}: its tensors claim more than the file holds")
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


def check_sha256(path: str | os.PathLike[str], expected: str) -> None:
    """Raises CheckpointError unless the file's SHA-256 is `expected` (hexadecimal)."""
    path = Path(path)
    check_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected.strip().lower():
        raise CheckpointError(f"{path}: its SHA-256 is {digest.hexdigest()}, not {expected}; fetch it again")


def recognise(
    tensors: Mapping[str, Tensor], architectures: Iterable[Architecture], source: str
) -> tuple[Architecture, ModelConfig]:
    """The architecture that knows these tensors, and their sizes. Raises CheckpointError with each one's reason."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    reasons = []
    for architecture in architectures:
        reason = architecture.why_not(shapes)
        if reason is None:
            try:
                return architecture, architecture.config(shapes)
            except CheckpointError as error:
                raise CheckpointError(f"{source}: {error}") from None
        reasons.append(f"{architecture.name}: {reason}")
    raise CheckpointError(f"{source}: no architecture here can run it ({'; '.join(reasons) or 'there are none'})")


def build_model(
    tensors: Mapping[str, Tensor],
    architectures: Iterable[Architecture],
    device: torch.device,
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
    progress: Progress | None = None,
    quant: str | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> Model:
    """Puts a model together on a device. dtype None: the file's own.

    Raises CheckpointError, or OptionError for a quantization, or a state in 16 bits, that the file's architecture
    does not have.
    """
    architecture, config = recognise(tensors, architectures, source)
    if quant is not None and quant not in architecture.quantizations:
        known = ", ".join(architecture.quantizations) or "none"
        raise OptionError(f"{source}: {architecture.name} has no quantization {quant!r}; it has {known}")
    if state_dtype != torch.float32 and not architecture.rounded:
        raise OptionError(f"{source}: {architecture.name} has no state in 16 bits")
    if device.type == "cpu":
        keep_freed_memory()
    own = own_dtype(tensors)
    dtype = dtype or own
    # What is made smaller on the way is not brought to a GPU as it is.
    ahead = Ahead(tensors if device.type == "cuda" and dtype == own and quant is None else {}, device)
    place = _Placer(tensors, ahead, device, dtype, progress, quant)
    try:
        with ahead:
            weights = architecture.weights(tensors, config, place, dtype)
            initial = architecture.initial_state(tensors, config, place)
        place.check()
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if progress:
        progress(place.total, place.total)  # a file may hold more than the model needs
    return Model(architecture, config, weights, device, dtype, initial, source, quant, state_dtype)


def own_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That of most of their numbers."""
    sizes: dict[torch.dtype, int] = {}
    for t in tensors.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


class _Placer:
    """Moves one tensor at a time, so that loading needs hardly more memory than the model.

    What a quantized model keeps as it is, it copies: one view of the file would keep all of it mapped.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        ahead: Ahead,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None,
        quant: str | None,
    ) -> None:
        self.tensors, self.ahead, self.device, self.dtype, self.quant = tensors, ahead, device, dtype, quant
        self.total, self.done, self.progress = sum(t.numel() for t in tensors.values()), 0, progress
        self.ends: dict[torch.dtype, list[tuple[str, Tensor]]] = {}  # the least and the largest numbers

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        here = self.ahead.take(name, tensor)
        placed = here.to(device=self.device, dtype=dtype or self.dtype, copy=self.quant is not None).contiguous()
        ends = self.ends.setdefault(placed.dtype, [])
        ends += [(name, end) for end in torch.aminmax(placed)]  # one pass, no copy; NaN propagates
        if not placed.is_cuda:
            self.check()
        self.done += tensor.numel()
        if self.progress:
            self.progress(self.done, self.total)
        return placed

    def check(self) -> None:
        """Raises CheckpointError for a number that is not finite; on a GPU for all at once, since it is waited for."""
        while self.ends:
            dtype, ends = self.ends.popitem()
            finite = torch.stack([end for _, end in ends]).cpu().isfinite().tolist()  # no kernels for so few
            for name, good in zip((name for name, _ in ends), finite, strict=True):
                if good:
                    continue
                if bool(torch.isfinite(self.tensors[name]).all()):
                    raise CheckpointError(f"tensor {name} does not fit {dtype}; use bfloat16 or float32")
                raise CheckpointError(f"tensor {name} holds NaN or infinity; the file is damaged")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""Tensors whose memory is a file's, and what reads them without touching it."""

from __future__ import annotations

import errno
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rwkv_runtime import CheckpointError, mapped
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.mapped import Mapped, Place, Reader, places

MEGABYTE = 1 << 20
NUMBERS = torch.arange(8 * MEGABYTE, dtype=torch.float32)  # 32 MiB
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped, and where")


@pytest.fixture(params=["model.pth", "model.safetensors"])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> Mapped:
    path, all_of_it = tmp_path / "a folder" / request.param, {"large": NUMBERS, "small": torch.arange(10.0)}
    path.parent.mkdir()
    if path.suffix == ".pth":
        torch.save(all_of_it, path)
    else:
        save_file(all_of_it, path)
    return Mapped(open_tensors(path), path)


@pytest.fixture
def reader(tensors: Mapped) -> Iterator[Reader]:
    with closing(Reader(tensors.path)) as reader:
        yield reader


@on_linux
@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(1, 5), slice(7, -3), slice(0, 0)], ids=str)
def test_any_part_of_a_tensor_is_read_as_it_is(tensors: Mapped, reader: Reader, part: slice) -> None:
    for tensor in tensors.values():
        to = torch.full_like(tensor[part], -1)
        reader.read(tensor[part], to)
        assert torch.equal(to, tensor[part])


@on_linux
def test_what_is_read_is_not_touched(tensors: Mapped, reader: Reader) -> None:
    """Or the system would note each page of it. 32 MiB are 8192."""
    import resource  # there is none on Windows

    to = torch.empty_like(NUMBERS).zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reader.read(tensors["large"], to)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100
    assert torch.equal(to, NUMBERS)


def test_what_lies_elsewhere_is_copied_from_there(reader: Reader) -> None:
    to = torch.zeros(10)
    reader.read(torch.arange(10.0), to)
    assert torch.equal(to, torch.arange(10.0))


@on_linux
def test_numbers_that_are_read_with_other_signs_are(tmp_path: Path) -> None:
    """torch keeps a view that is negative as such, in a file, too."""
    path = tmp_path / "model.pth"
    torch.save({"negative": torch._neg_view(torch.arange(9.0))}, path)
    tensors, to = Mapped(open_tensors(path), path), torch.empty(9)
    with closing(Reader(path)) as reader:
        reader.read(tensors["negative"], to)
    assert to.tolist() == (-torch.arange(9.0)).tolist()


@on_linux
def test_a_file_of_the_other_byte_order_is_read_as_it_is_meant(tmp_path: Path) -> None:
    """torch turns the bytes round in the memory that is mapped."""
    path, other = tmp_path / "model.pth", tmp_path / "other.pth"
    torch.save({"numbers": torch.arange(9.0)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/byteorder"):
                data = b"big" if sys.byteorder == "little" else b"little"
            if "/data/" in entry.filename:
                data = np.frombuffer(data, np.float32).byteswap().tobytes()
            new.writestr(entry.filename, data)
    tensors, to = Mapped(open_tensors(other), other), torch.empty(9)
    assert tensors["numbers"].tolist() == list(range(9))
    with closing(Reader(other)) as reader:
        reader.read(tensors["numbers"], to)
    assert to.tolist() == list(range(9))


@on_linux
def test_a_file_that_has_taken_another_s_place_is_not_read_for_it(tensors: Mapped, tmp_path: Path) -> None:
    path = Path(tensors.path)
    other = tmp_path / "other"
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    with closing(Reader(path)) as reader:
        to = torch.zeros_like(NUMBERS)
        reader.read(tensors["large"], to)
    assert torch.equal(to, NUMBERS)


@on_linux
@pytest.mark.parametrize("kept", [0, 1000, 1 << 20])
def test_a_file_that_becomes_shorter_is_told(tensors: Mapped, reader: Reader, kept: int) -> None:
    """To touch its memory would end the process."""
    os.truncate(tensors.path, kept)
    with pytest.raises(CheckpointError, match="shorter while it was read"):
        reader.read(tensors["large"], torch.empty_like(NUMBERS))


@on_linux
def test_a_file_that_cannot_be_read_is_told(tensors: Mapped, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        reader.read(tensors["large"], torch.empty_like(NUMBERS))


@on_linux
def test_it_is_read_on_where_the_system_stopped(
    tensors: Mapped, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does at two gigabytes."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: whole(file, [into[0][:1000_003]], offset))
    to = torch.empty_like(NUMBERS)
    reader.read(tensors["large"], to)
    assert torch.equal(to, NUMBERS)


@on_linux
def test_a_file_is_found_where_it_lies(tensors: Mapped, tmp_path: Path) -> None:
    path, large = Path(tensors.path), tensors["large"]
    [at] = {at for place in places(path) if (at := place.of(large)) is not None}
    assert path.read_bytes()[at : at + large.nbytes] == large.numpy().tobytes()
    link = tmp_path / "link"
    link.symlink_to(path)
    assert places(link) == places(path)
    assert places(tmp_path / "another") == []


def test_only_what_lies_in_a_place_as_a_whole_is_of_it() -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    begin = tensor.data_ptr()
    assert Place(range(begin - 50, begin + 100), 7).of(tensor) == 57
    assert Place(range(begin - 50, begin + 99), 7).of(tensor) is None
    assert Place(range(begin + 1, begin + 200), 7).of(tensor) is None


def test_names_that_are_written_otherwise_lie_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    lines = [
        f"10-20 r--p 00000000 00:00 7 {path} (deleted)",
        f"20-30 r--p 00000000 00:00 7 /other\r{path}",
        "30-40 r--p",
    ]
    (tmp_path / "maps").write_bytes("".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setattr(mapped, "MAPS", str(tmp_path / "maps"))
    assert places(path) == []
    (tmp_path / "maps").write_text(f"10-20 r--p 00000005 00:00 7   {path}\n")
    assert places(path) == [Place(range(16, 32), 5)]


@pytest.mark.parametrize("nothing", ["no such file", "."])
def test_where_the_system_does_not_say_memory_is_read(
    tensors: Mapped, tmp_path: Path, nothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is something that is there and cannot be read."""
    monkeypatch.setattr(mapped, "MAPS", str(tmp_path / nothing))
    assert places(tensors.path) == []
    with closing(Reader(tensors.path)) as reader:
        to = torch.zeros_like(NUMBERS)
        reader.read(tensors["large"], to)
    assert torch.equal(to, NUMBERS)

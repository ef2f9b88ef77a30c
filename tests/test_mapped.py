"""Tensors whose memory is a file's: pages that nobody needs leave the process, and come back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_runtime import mapped
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.mapped import Mapped

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


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@on_linux
def test_pages_that_are_given_back_leave_and_come_again(tensors: Mapped) -> None:
    assert torch.equal(tensors["large"], NUMBERS)
    before = resident()
    tensors.give_back(tensors["large"])
    assert before - resident() > 30 * MEGABYTE
    assert torch.equal(tensors["large"], NUMBERS)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where the system was told that pages may go, and how many bytes of them."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Mapped, "_advise", lambda self, begin, length, _: told.append((begin.value, length.value)))
    return told


@on_linux
def test_only_whole_pages_go(tensors: Mapped, left: list[tuple[int, int]]) -> None:
    """Of a page that another tensor has a part of, or what the file says of itself, nothing is given back."""
    tensors.give_back(tensors["large"])
    [(begin, length)] = left
    first, page = tensors["large"].data_ptr(), mmap.PAGESIZE
    assert begin % page == length % page == 0
    assert first <= begin < first + page
    assert first + NUMBERS.nbytes - page < begin + length <= first + NUMBERS.nbytes


def test_what_is_too_small_to_have_a_page_stays(tensors: Mapped, left: list[tuple[int, int]]) -> None:
    tensors.give_back(tensors["small"])
    tensors.give_back(torch.empty(0))
    assert [length for _, length in left if length] == []


def test_other_memory_is_left_alone(tensors: Mapped) -> None:
    """Its pages would come back as zeros."""
    other = NUMBERS.clone()
    tensors.give_back(other)
    assert torch.equal(other, NUMBERS)


@on_linux
def test_a_file_is_found_where_it_lies(tensors: Mapped, tmp_path: Path) -> None:
    path = next((tmp_path / "a folder").iterdir())
    at = tensors["large"].data_ptr()
    assert any(at in place and at + NUMBERS.nbytes - 1 in place for place in mapped.places(path))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert mapped.places(link) == mapped.places(path)
    assert mapped.places(tmp_path / "another") == []


@pytest.mark.parametrize("nothing", ["no such file", "."])
def test_where_the_system_does_not_say_nothing_is_given_back(
    tensors: Mapped, tmp_path: Path, nothing: str, left: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is something that is there and cannot be read."""
    monkeypatch.setattr(mapped, "MAPS", str(tmp_path / nothing))
    same = Mapped(tensors, next((tmp_path / "a folder").iterdir()))
    same.give_back(same["large"])
    assert left == []

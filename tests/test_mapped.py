"""Tensors whose memory is a file's: pages that nobody needs leave the process, and come back."""

from __future__ import annotations

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
    return open_tensors(path)


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@on_linux
def test_pages_that_are_given_back_leave_and_come_again(tensors: Mapped) -> None:
    assert torch.equal(tensors["large"], NUMBERS)
    before = resident()
    tensors.give_back(tensors["large"])
    assert before - resident() > 30 * MEGABYTE
    assert torch.equal(tensors["large"], NUMBERS)


def test_what_is_too_small_to_have_a_page_stays(tensors: Mapped) -> None:
    tensors.give_back(tensors["small"])
    tensors.give_back(torch.empty(0))
    assert torch.equal(tensors["small"], torch.arange(10.0))


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


def test_where_the_system_does_not_say_nothing_is_given_back(
    tensors: Mapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "MAPS", str(tmp_path / "none"))
    same = Mapped(tensors, next((tmp_path / "a folder").iterdir()))
    same.give_back(same["large"])
    assert torch.equal(same["large"], NUMBERS)

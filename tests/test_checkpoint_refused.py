"""What is refused: every bad file costs one clear line, never another exception, and never runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Tensors, built, loaded, logits_of, tiny_config
from safetensors.torch import save, save_file

from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.errors import CheckpointError
from rwkv_runtime.model import Architecture
from rwkv_runtime.plugins import Plugins


@pytest.fixture(scope="module")
def small(architecture: Architecture) -> Tensors:
    """A model of one layer that takes a few kilobytes."""
    config = replace(tiny_config(architecture, 1), n_embd=4, n_head=2, head_size=2, n_ffn=4, vocab_size=6)
    return architecture.random(replace(config, ranks=dict.fromkeys(config.ranks, 2)))


def pth(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def lying(tensors: Tensors, change: Callable[[dict[str, object]], object]) -> bytes:
    """A safetensors file whose header was changed."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def refusal(path: Path, plugins: Plugins) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(path, plugins)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


class Canary:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch '{self.path}'",)


def test_what_is_not_a_file_or_not_there(plugins: Plugins, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pth", plugins) == "no such file"
    assert refusal(tmp_path, plugins).startswith("a directory")
    (tmp_path / "empty.pth").touch()
    assert "empty" in refusal(tmp_path / "empty.pth", plugins)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(plugins: Plugins, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe", plugins)


@pytest.mark.parametrize(
    "content", [b"x", b"\x00" * 64, b"<!DOCTYPE html><html>404</html>", b"\x80", b"PK\x03\x04", b"GGUF" + bytes(99)]
)
def test_what_is_no_checkpoint_at_all(content: bytes, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    assert refusal(tmp_path / "model.pth", plugins)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_says_so(kind: str, share: float, small: Tensors, plugins: Plugins, tmp_path: Path) -> None:
    data = pth(small) if kind == "pth" else save(small)
    (tmp_path / "model").write_bytes(data[: max(12, int(len(data) * share))])
    assert "truncated" in refusal(tmp_path / "model", plugins)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"emb.weight": c}, lambda c: {"a": [torch.ones(2), c]}])
def test_a_pickle_that_carries_code_is_refused_and_not_run(
    wrap: Callable[[Canary], object], plugins: Plugins, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    (tmp_path / "model.pth").write_bytes(pth(wrap(Canary(canary))))
    assert "could run code; refused" in refusal(tmp_path / "model.pth", plugins)
    torch.save(wrap(Canary(canary)), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(wrap(Canary(canary))))
    for name in ("old.pth", "bare.pkl"):
        assert "a bare pickle, which could run code" in refusal(tmp_path / name, plugins)
    assert not canary.exists()


def test_archives_that_torch_did_not_write(small: Tensors, plugins: Plugins, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    assert "not one that torch.save wrote" in refusal(tmp_path / "text.docx", plugins)
    with (
        zipfile.ZipFile(io.BytesIO(pth(small))) as source,
        zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert "compressed" in refusal(tmp_path / "model.pth", plugins)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "no tensors"),
        ({"a": 1}, "'a' is a int"),
        ({"model": {"a": torch.ones(2)}}, "'model' is a dict"),
        ({1: torch.ones(2)}, "1 is a Tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "tensor a is int64"),
        ({"a": torch.ones(2, dtype=torch.uint8)}, "tensor a is uint8"),
        ({"a": torch.eye(2).to_sparse()}, "tensor a is"),
        ({"a": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])}, "tensor a is"),
        ({"a": torch.empty(2, device="meta")}, "tensor a is|damaged"),
        ({"a": torch.zeros(1).expand(1 << 40, 8)}, "more than the file holds"),
        ({f"a{i}": torch.zeros(1).expand(1) for i in range(3)}, "no architecture here can run it"),
    ],
)
def test_content_that_is_not_weights(content: object, reason: str, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(pth(content))
    assert re.search(reason, refusal(tmp_path / "model.pth", plugins))


def test_many_names_for_one_storage_claim_no_more_than_the_file_holds(plugins: Plugins, tmp_path: Path) -> None:
    storage = torch.zeros(1000)
    (tmp_path / "model.pth").write_bytes(pth({f"a{i}": storage for i in range(50)}))
    assert "claim more than the file holds" in refusal(tmp_path / "model.pth", plugins)


def _first(header: dict[str, object]) -> dict[str, object]:
    entry = header["emb.weight"]
    assert isinstance(entry, dict)
    return entry


@pytest.mark.parametrize(
    "change",
    [
        lambda h: _first(h).update(data_offsets=[0, 1 << 50]),
        lambda h: _first(h).update(data_offsets=[0, "many"]),
        lambda h: _first(h).update(data_offsets=[0, None]),
        lambda h: _first(h).update(data_offsets=[8, 4]),
        lambda h: _first(h).update(data_offsets=[-4, 4]),
        lambda h: _first(h).update(data_offsets=[]),
        lambda h: _first(h).update(shape=[1 << 40, 1 << 40]),
        lambda h: _first(h).update(shape=[-1]),
        lambda h: _first(h).update(shape="big"),
        lambda h: _first(h).update(dtype="F31"),
        lambda h: _first(h).pop("dtype"),
        lambda h: h.update({"emb.weight": None}),
        lambda h: h.update({"__metadata__": {"a": {}}}),
        lambda h: h.clear(),
        lambda h: h.update(more={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_a_safetensors_header_that_lies(
    change: Callable[[dict[str, object]], object], small: Tensors, plugins: Plugins, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(lying(small, change))
    assert "damaged" in (message := refusal(tmp_path / "model.safetensors", plugins)) or "truncated" in message


@pytest.mark.parametrize(
    ("names", "version"),
    [
        (["blocks.0.att.time_mix_k", "blocks.0.att.time_first"], "RWKV-4"),
        (["blocks.0.att.time_mix_k", "blocks.0.att.time_faaaa", "blocks.0.att.ln_x.weight"], "RWKV-5"),
        (["blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight"], "RWKV-7 with DeepEmbed"),
        (["model.layers.0.self_attn.q_proj.weight"], "no blocks"),
    ],
)
def test_another_versions_tensors_are_called_by_its_name(names: list[str], version: str, plugins: Plugins) -> None:
    with pytest.raises(CheckpointError, match=version):
        built({name: torch.ones(4) for name in names}, plugins)


def test_each_missing_tensor_is_named(checkpoint: Tensors, plugins: Plugins) -> None:
    for name in checkpoint:
        with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
            built({n: t for n, t in checkpoint.items() if n != name}, plugins)


def test_each_wrong_shape_is_named(checkpoint: Tensors, plugins: Plugins) -> None:
    for name, t in checkpoint.items():
        for wrong in (torch.cat([t, t], dim=-1), t[:0], t.flatten()[: t.numel() - 1]):
            with pytest.raises(CheckpointError, match=r"tensor blocks|tensor emb|tensor head|tensor ln_out"):
                built(checkpoint | {name: wrong}, plugins)


def test_heads_that_do_not_make_up_the_width(checkpoint: Tensors, plugins: Plugins) -> None:
    wrong = {n: torch.ones(5, 13) for n in checkpoint if n.endswith(("time_faaaa", "r_k"))}
    with pytest.raises(CheckpointError, match=r"(time_faaaa|r_k) is \[5, 13\]"):
        built(checkpoint | wrong, plugins)


def test_a_state_in_some_layers_only_or_of_a_wrong_shape(checkpoint: Tensors, plugins: Plugins) -> None:
    state = torch.zeros(2, 16, 16)
    for layer in range(2):
        with pytest.raises(CheckpointError, match=f"tensor blocks.{1 - layer}.att.time_state is missing"):
            built(checkpoint | {f"blocks.{layer}.att.time_state": state}, plugins)
    with pytest.raises(CheckpointError, match="time_state is"):
        built(checkpoint | {f"blocks.{i}.att.time_state": state[:1] for i in range(2)}, plugins)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_in_any_tensor(value: float, checkpoint: Tensors, plugins: Plugins) -> None:
    for name, t in checkpoint.items():
        bad = t.clone()
        bad.view(-1)[-1] = value
        with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
            built(checkpoint | {name: bad}, plugins)


def test_a_value_too_large_for_float16_is_told_from_a_damaged_one(checkpoint: Tensors, plugins: Plugins) -> None:
    big = checkpoint["head.weight"].clone()
    big[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"tensor head.weight does not fit torch.float16; use bfloat16"):
        built(checkpoint | {"head.weight": big}, plugins, torch.float16)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_any_damage_is_refused_or_leaves_a_model(kind: str, small: Tensors, plugins: Plugins, tmp_path: Path) -> None:
    path = tmp_path / "model"
    whole = pth(small) if kind == "pth" else save(small)
    draw = random.Random(2)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((0, 1, 1, 3, 30))):
            # Headers and the directory at the end are hit as often as the long stretch of numbers.
            at = draw.choice((draw.randrange(len(data)), draw.randrange(1500), len(data) - 1 - draw.randrange(1500)))
            data[at] = draw.choice((draw.randrange(256), data[at] ^ 1 << draw.randrange(8), 0, 255))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            outcomes.add(logits_of(loaded(path, plugins), [1, 2]).shape)
        except CheckpointError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
    assert outcomes == {(2, 6), "refused"}


def test_names_with_line_breaks_still_give_one_line(plugins: Plugins, tmp_path: Path) -> None:
    save_file({"a\nb": torch.ones(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_tensors(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)

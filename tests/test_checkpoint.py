"""What can be loaded: both formats, every size, every number type, without copying the file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CPU, VOCAB_SIZE, Tensors, apart, built, loaded, logits_of, only, tiny_config, tokens_of
from safetensors.torch import save_file

import rwkv_runtime
from rwkv_runtime.checkpoint import build_model, check_sha256, open_tensors
from rwkv_runtime.errors import CheckpointError
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.tokenizer import Tokenizer

TOKENS = tokens_of(40)
FORMATS = ("pth", "safetensors")


def saved(tensors: Tensors, folder: Path, kind: str) -> Path:
    path = folder / f"model.{kind}"
    if kind == "pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_both_formats_give_the_same_logits(
    kind: str, checkpoint: Tensors, model: Model, plugins: Plugins, tmp_path: Path
) -> None:
    ours = loaded(saved(checkpoint, tmp_path, kind), plugins)
    assert torch.equal(logits_of(ours, TOKENS), logits_of(model, TOKENS))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_read_from_the_file_not_from_its_name(kind: str, checkpoint: Tensors, tmp_path: Path) -> None:
    path = saved(checkpoint, tmp_path, kind).rename(tmp_path / "weights")
    assert open_tensors(path).keys() == checkpoint.keys()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the kernel's list of mappings")
@pytest.mark.parametrize("kind", FORMATS)
def test_weights_of_the_files_own_type_stay_in_the_mapped_file(
    kind: str, checkpoint: Tensors, plugins: Plugins, tmp_path: Path
) -> None:
    path = saved(checkpoint, tmp_path, kind)
    weights = loaded(path, plugins).weights
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    matrices = (weights.head, weights.blocks[1].att.output, weights.blocks[0].ffn.key)
    for tensor in (weights.emb, *(matrix.weight for matrix in matrices)):
        assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)


LOAD = """
import json, sys
from pathlib import Path
from rwkv_runtime import Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors
import torch

def status(key):
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024

def load(path):
    return build_model(open_tensors(path), Plugins.load({"RWKV_PLUGINS": ""}).architectures, torch.device("cpu"))

small = load(sys.argv[1])
before = status("VmRSS")
large = load(sys.argv[2])
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's count of memory")
@pytest.mark.parametrize("kind", FORMATS)
def test_loading_needs_hardly_more_memory_than_the_file(
    kind: str, architecture: Architecture, checkpoint: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    small = saved(checkpoint, tmp_path / "small", kind)
    large = saved(architecture.random(architecture.sizes(2, 512, 20000)), tmp_path, kind)  # most of it embedding
    size = large.stat().st_size
    assert size > 60e6
    result = subprocess.run([sys.executable, "-c", LOAD, small, large], capture_output=True, text=True, check=True)
    assert 0.5 * size < json.loads(result.stdout) < 1.2 * size


@pytest.mark.parametrize("head_size", [1, 8, 32])
def test_every_size_is_read_from_the_shapes(head_size: int, architecture: Architecture, plugins: Plugins) -> None:
    config = replace(tiny_config(architecture, 3, head_size), n_ffn=40, vocab_size=17)
    config = replace(config, ranks={name: 3 + i for i, name in enumerate(config.ranks)})
    model = built(architecture.random(config), plugins)
    assert model.config == config
    assert model.config.n_head == 32 // head_size
    assert logits_of(model, [1, 2, 3]).shape == (3, 17)


def test_the_number_type_is_the_files_own_unless_another_is_asked_for(
    architecture: Architecture, plugins: Plugins
) -> None:
    tensors = architecture.random(tiny_config(architecture), dtype=torch.bfloat16)
    (decay,) = tensors.keys() & {"blocks.0.att.time_decay", "blocks.0.att.w0"}
    tensors[decay] = tensors[decay].float()  # as released files have it
    assert built(tensors, plugins).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = built(tensors, plugins, dtype)
        assert model.dtype == model.weights.head.weight.dtype == model.new_state()["att_x_prev"].dtype == dtype
        assert model.weights.blocks[0].att.ln_x_weight.dtype == model.new_state()["att_kv"].dtype == torch.float32
        assert logits_of(model, [1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005), (torch.float32, 1e-6)]
)
def test_deep_models_keep_their_meaning_in_every_number_type(
    dtype: torch.dtype, tolerance: float, architecture: Architecture, plugins: Plugins
) -> None:
    tensors = architecture.random(tiny_config(architecture, layers=14))
    for name in tensors:  # each layer adds a little, as in trained models: rounding is not blown up
        if name.endswith(("att.output.weight", "ffn.value.weight")):
            tensors[name] *= 0.1
    ours = logits_of(built(tensors, plugins, dtype), TOKENS)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    assert apart(ours, architecture.reference(rounded, TOKENS)) < tolerance


@only("rwkv6")
def test_float16_halves_the_stream_every_six_layers(architecture: Architecture, plugins: Plugins) -> None:
    tensors = architecture.random(tiny_config(architecture, layers=13))
    blocks = built(tensors, plugins, torch.float16).weights.blocks
    for layer, scale in ((0, 1.0), (5, 1.0), (6, 0.5), (11, 0.5), (12, 0.25)):
        for ours, name in ((blocks[layer].att.output, "att.output"), (blocks[layer].ffn.value, "ffn.value")):
            theirs = tensors[f"blocks.{layer}.{name}.weight"].half()
            torch.testing.assert_close(ours.weight, theirs * scale, rtol=1e-3, atol=1e-6)


def test_a_state_tuned_file_starts_every_text_from_its_state(
    architecture: Architecture, checkpoint: Tensors, model: Model, plugins: Plugins
) -> None:
    draw = torch.Generator().manual_seed(3)
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16, generator=draw) for i in range(2)}
    tuned = built(checkpoint | states, plugins)
    ours = logits_of(tuned, TOKENS)
    assert apart(ours, architecture.reference(checkpoint | states, TOKENS)) < 1e-5
    assert apart(ours, logits_of(model, TOKENS)) > 0.01
    state = tuned.new_state(3)
    for row in range(3):
        assert torch.equal(state["att_kv"][1, row], states["blocks.1.att.time_state"].transpose(1, 2))
    state["att_kv"].fill_(7.0)
    state.clear(1)
    assert torch.equal(state["att_kv"][:, 1], tuned.new_state()["att_kv"][:, 0])
    assert bool((state["att_kv"][:, 0] == 7.0).all())


def test_axes_of_length_one_may_be_there_or_not(checkpoint: Tensors, model: Model, plugins: Plugins) -> None:
    padded = {n: t.view(1, 1, -1) if t.dim() == 1 else t for n, t in checkpoint.items()}
    padded |= {n: t.view(-1, 1) for n, t in checkpoint.items() if n.endswith("ln1.weight")}
    assert torch.equal(logits_of(built(padded, plugins), TOKENS), logits_of(model, TOKENS))


def test_parameters_and_further_tensors_do_no_harm(
    checkpoint: Tensors, model: Model, plugins: Plugins, tmp_path: Path
) -> None:
    values = {name: torch.nn.Parameter(t) for name, t in checkpoint.items()}
    torch.save(values | {"extra": torch.ones(3)}, tmp_path / "model.pth")
    ours = loaded(tmp_path / "model.pth", plugins)
    assert torch.equal(logits_of(ours, TOKENS), logits_of(model, TOKENS))
    assert not logits_of(ours, TOKENS).requires_grad


def test_the_checkpoint_given_is_not_changed(checkpoint: Tensors, plugins: Plugins) -> None:
    before = {name: t.clone() for name, t in checkpoint.items()}
    for dtype in (torch.float16, torch.float32):
        logits_of(built(checkpoint, plugins, dtype), TOKENS)
    assert all(torch.equal(t, before[name]) for name, t in checkpoint.items())


def test_progress_rises_to_the_whole(checkpoint: Tensors, plugins: Plugins) -> None:
    calls: list[tuple[int, int]] = []
    extra = {"extra": torch.zeros(100)}
    build_model(checkpoint | extra, plugins.architectures, CPU, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    total = sum(t.numel() for t in checkpoint.values()) + 100
    assert done == sorted(done)
    assert len(set(done)) > 20
    assert calls[-1] == (total, total)
    assert {call[1] for call in calls} == {total}


def test_a_sha256_is_checked_before_anything_is_read(checkpoint: Tensors, tmp_path: Path) -> None:
    path = saved(checkpoint, tmp_path, "pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check_sha256(path, digest.upper() + "\n")
    with pytest.raises(CheckpointError, match=f"its SHA-256 is {digest}, not 00ff"):
        rwkv_runtime.load(path, sha256="00ff")
    with pytest.raises(CheckpointError, match="no such file"):
        rwkv_runtime.load(tmp_path / "none.pth", sha256="00ff")


def test_load_puts_model_and_vocabulary_together(
    checkpoint: Tensors, model: Model, tokenizer: Tokenizer, plugins: Plugins, tmp_path: Path
) -> None:
    path = saved(checkpoint, tmp_path, "safetensors")
    tokenizer.to_file(tmp_path / "model.vocab.txt")
    runtime = rwkv_runtime.load(path, device="cpu", backend="eager", plugins=plugins)
    assert runtime.model.config.vocab_size == VOCAB_SIZE
    assert runtime.tokenizer.tokens == tokenizer.tokens
    assert torch.equal(runtime.logits(TOKENS), logits_of(model, TOKENS))

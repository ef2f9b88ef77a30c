"""The story model that comes with the package."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rwkv_runtime
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.errors import CheckpointError
from rwkv_runtime.runtime import Runtime

TEXT = (
    " One day, a little girl named Anna went to the park with her dog. The dog saw a red ball and ran after it. "
    'Anna laughed and said, "Come back!" They played together all day and were very happy.'
)


@pytest.fixture(scope="module")
def story() -> Runtime:
    return rwkv_runtime.load(backend="eager")


def bits_per_byte(model: Runtime, text: str) -> float:
    tokens = model.tokenizer.encode(text)
    log_probs = torch.log_softmax(model.logits([0, *tokens[:-1]]), dim=-1)
    nats = -log_probs.gather(1, torch.tensor(tokens)[:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


def test_it_predicts_simple_english_well(story: Runtime) -> None:
    assert bits_per_byte(story, TEXT) < 0.9
    shuffled = " ".join(sorted(TEXT.split()))
    assert bits_per_byte(story, shuffled) > 2 * bits_per_byte(story, TEXT)


def test_without_a_prompt_it_writes_a_story_and_ends_it(story: Runtime) -> None:
    writings = [story.generate(seed=seed, max_tokens=400, temperature=0.5) for seed in range(3)]
    texts = ["".join(writing) for writing in writings]
    assert "end" in [writing.generation.finish for writing in writings]
    assert all(len(text.split()) > 40 for text in texts)


def test_it_goes_on_from_a_prompt_and_stays_with_its_subject(story: Runtime) -> None:
    texts = story.generate_batch(["Tom found a map."] * 8, seed=0, max_tokens=120)
    assert sum("Tom" in text or "map" in text for text in texts) >= 7


def test_it_fits_the_size_and_the_names_of_an_ordinary_checkpoint() -> None:
    path = embedded_model()
    tensors = open_tensors(path)
    assert path.stat().st_size <= 25e6
    assert 8e6 <= sum(t.numel() for t in tensors.values()) <= 12e6
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert tensors["blocks.0.att.time_faaaa"].shape[1] == 64


def test_the_card_and_the_vocabulary_lie_beside_it() -> None:
    folder = embedded_model().parent
    assert (folder / "story.vocab.txt").is_file()
    card = (folder / "story.md").read_text(encoding="utf-8")
    for words in ("gpt-4o-mini", "TinyStories", "ChiLit", "FairytaleQA", "StoryWeaver", "written by a language model"):
        assert words in card


def test_most_of_what_a_trained_channel_mixing_computes_is_zero(story: Runtime) -> None:
    """After relu^2 most of the FFN's inner values are exactly zero: random weights would leave half of them."""
    block = story.model.weights.blocks[4]
    tokens = torch.tensor([story.tokenizer.encode(TEXT)])
    inputs: list[torch.Tensor] = []
    ops = dict(story.model.architecture.ops)
    original = ops["channel_mixing"]

    def spy(x, x_prev, w):
        if w is block.ffn:
            inputs.append(x)
        return original(x, x_prev, w)

    state = story.model.new_state()
    story.model.architecture.forward({**ops, "channel_mixing": spy}, story.model.weights, tokens, state)
    zero = (F.relu(F.linear(inputs[0], block.ffn.key.weight)) == 0).float().mean().item()
    assert zero > 0.6


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the packaged files."""
    for name in ("story.json", "story.safetensors", "story.vocab.txt"):
        shutil.copy(embedded_model().parent / name, tmp_path / name)
    return tmp_path


def test_a_missing_file_is_named_with_how_to_reinstall(package: Path) -> None:
    (package / "story.vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"story\.vocab\.txt: missing; .*reinstall with: pip install"):
        embedded_model(package)


def test_a_damaged_file_is_named_with_what_was_expected(package: Path) -> None:
    path = package / "story.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    with pytest.raises(CheckpointError, match=r"story\.safetensors: damaged: its SHA-256 is .*, expected .*reinstall"):
        embedded_model(package)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"damaged: 1,000 bytes, expected {whole:,}; reinstall"):
        embedded_model(package)


def test_a_damaged_list_of_files_is_reported(package: Path) -> None:
    (package / "story.json").write_text(json.dumps({"files": 3}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="list of files is missing or damaged"):
        embedded_model(package)

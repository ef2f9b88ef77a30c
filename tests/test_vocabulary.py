"""A model comes with the vocabulary that was given, the one beside it or RWKV World's; a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import VOCAB_SIZE, Tensors
from safetensors.torch import save_file

import rwkv_runtime
from rwkv_runtime.errors import VocabularyError
from rwkv_runtime.tokenizer import Tokenizer, world_vocabulary
from rwkv_runtime.vocabulary import find_vocabulary


def words(folder: Path, name: str, extra: int = 0) -> Path:
    """A vocabulary of all bytes, and of so many tokens more."""
    tokens = {i + 1: bytes([i]) for i in range(256)} | {257 + i: b"x" * (2 + i) for i in range(extra)}
    Tokenizer.from_tokens(tokens).to_file(folder / name)
    return folder / name


def test_the_one_given_comes_before_the_one_beside_the_checkpoint_and_that_before_world(tmp_path: Path) -> None:
    model = tmp_path / "model.pth"
    assert find_vocabulary(model, None, 65536) == world_vocabulary()
    beside, given = words(tmp_path, "model.vocab.txt"), words(tmp_path, "given.txt")
    assert find_vocabulary(model, None, 65536) == beside
    assert find_vocabulary(model, given, 65536) == given


def test_where_none_fits_it_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"has 1,000 entries.* no model\.vocab\.txt beside it"):
        find_vocabulary(tmp_path / "model.pth", None, 1000)


def test_a_missing_one_is_told_before_any_weight_is_read(checkpoint: Tensors, tmp_path: Path) -> None:
    save_file(checkpoint, tmp_path / "model.safetensors")
    read: list[object] = []
    with pytest.raises(VocabularyError, match=r"none\.txt': cannot read the vocabulary: No such file or directory"):
        rwkv_runtime.load(
            tmp_path / "model.safetensors", vocab=tmp_path / "none.txt", progress=lambda *step: read.append(step)
        )
    assert read == []


def test_one_with_more_tokens_than_the_model_has_is_another_models(checkpoint: Tensors, tmp_path: Path) -> None:
    save_file(checkpoint, tmp_path / "model.safetensors")
    most = VOCAB_SIZE - 257  # id 0 and the bytes come before
    fits, larger = words(tmp_path, "fits.txt", most), words(tmp_path, "larger.txt", most + 1)
    assert rwkv_runtime.load(tmp_path / "model.safetensors", vocab=fits).tokenizer.vocab_size == VOCAB_SIZE
    with pytest.raises(VocabularyError, match=rf"has ids up to {VOCAB_SIZE}, the model only {VOCAB_SIZE}"):
        rwkv_runtime.load(tmp_path / "model.safetensors", vocab=larger)

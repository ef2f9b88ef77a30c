"""The text that the story model learns from: documents, hold-out, vocabulary, windows."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from story_models import TINY, shaken_model, text_windows

from rwkv_runtime.tokenizer import Tokenizer
from training.arrays import load_tokens, save_tokens
from training.data import IGNORED, Heldout
from training.evaluate import bits_per_byte
from training.prepare import is_heldout, learn_vocabulary, prepare, split_documents

CPU = torch.device("cpu")


def test_windows_lie_inside_their_source() -> None:
    windows = text_windows()
    only_second = windows.weights({"two": 2.0})
    assert only_second.tolist() == [0.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    inputs, targets = windows.batch(only_second, 50, 32, 1.0, generator)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    starts_with_document = inputs[:, 0] == 0  # the last document is too short: its window begins earlier
    assert starts_with_document.float().mean() > 0.8
    second = windows.tokens[3000:].long().unfold(0, 33, 1)
    for row in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert (second == row).all(1).any()
    with pytest.raises(ValueError, match="unknown sources"):
        windows.weights({"three": 1.0})


def test_documents_are_split_and_told_apart() -> None:
    text = "One.\n\nStill one.\n<|endoftext|>\n<|endoftext|>\nTwo.\n<|endoftext|>\nTwo.\n<|endoftext|>\n"
    assert list(split_documents(text)) == ["One.\n\nStill one.", "Two."]


def test_hold_out_is_deterministic_and_one_per_cent() -> None:
    held = [number for number in range(5000) if is_heldout(f"document {number}")]
    assert held == [number for number in range(5000) if is_heldout(f"document {number}")]
    assert 25 < len(held) < 80


def small_corpus(folder: Path) -> list[str]:
    documents = [f"Tom had {number} red hats. He saw a dög and ran {number * 7} miles." for number in range(400)]
    text = "".join(f"{document}\n<|endoftext|>\n" for document in documents)
    folder.mkdir()
    (folder / "hats.txt.xz").write_bytes(lzma.compress(text.encode("utf-8")))
    return documents


def test_prepared_corpus(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    documents = small_corpus(tmp_path / "corpus")
    prepare(tmp_path / "corpus", tmp_path / "data", entries=300, workers=1)
    tokenizer = Tokenizer.from_file(tmp_path / "data" / "vocab.txt")
    assert [tokenizer.decode_bytes([byte + 1]) for byte in range(256)] == [bytes([b]) for b in range(256)]
    found = {}
    for split in ("train", "heldout"):
        tokens = load_tokens(tmp_path / "data" / f"hats.{split}.npy.xz")
        assert tokens.dtype == np.uint16
        pieces = np.split(tokens, np.flatnonzero(tokens == 0))[1:]
        found[split] = {tokenizer.decode(piece.tolist()) for piece in pieces}
        assert all(tokenizer.encode(tokenizer.decode(piece.tolist())) == piece[1:].tolist() for piece in pieces)
    assert not found["train"] & found["heldout"]
    assert found["heldout"]
    assert found["train"] | found["heldout"] == set(documents)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text(encoding="utf-8"))
    count = sum(len(document.encode("utf-8")) for document in found["heldout"])
    assert meta["sources"]["hats"]["heldout"]["bytes"] == count

    heldout = Heldout.load(tmp_path / "data", 16, 50, 300, CPU)
    tokens = meta["sources"]["hats"]["heldout"]["tokens"]
    assert int((heldout.windows[:, 1:] != IGNORED).sum()) == tokens - 1
    assert heldout.bytes.tolist() == [count]
    assert len(Heldout.load(tmp_path / "data", 16, 2, 300, CPU).windows) == 2
    model = shaken_model(TINY)
    report = bits_per_byte(model, tmp_path / "data")["hats"]
    assert report["bytes"] == count
    with torch.no_grad():  # the same, one document at a time and without padding
        nats = 0.0
        for document in sorted(found["heldout"]):
            ids = torch.tensor([[0, *tokenizer.encode(document), 0]])
            nats += float(model.losses(ids[:, :-1], ids[:, 1:]).double().sum())
    assert report["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)
    some = bits_per_byte(model, tmp_path / "data", "train", 5)["hats"]
    assert (some["documents"], report["documents"]) == (5, len(found["heldout"]))


def test_vocabulary_tokens_do_not_cross_words() -> None:
    pytest.importorskip("tokenizers")
    tokens = learn_vocabulary(iter(["the cat sat. the cat ran\n\nthe cat slept 10 times"] * 20), 290)
    assert len(tokens) <= 289
    assert b" cat" in tokens.values()
    assert all(b" " not in token[1:] for token in tokens.values())


def test_token_arrays_survive_the_disk(tmp_path: Path) -> None:
    tokens = np.arange(4096, dtype=np.uint16)
    save_tokens(tmp_path / "a.npy.xz", tokens)
    assert np.array_equal(load_tokens(tmp_path / "a.npy.xz"), tokens)

"""Corpus preparation: hold-out split, vocabulary, token arrays.

Reads every ``*.txt.xz`` of a folder (UTF-8; a document ends with a line ``<|endoftext|>``) and writes into
another:

- ``vocab.txt``: a byte-level vocabulary in RWKV's format (``id literal length``; id 0 is end of text and has no
  line, byte b is id b + 1, longer tokens follow);
- ``<source>.<split>.npy.xz``: one uint16 array for each source and split, every document preceded by id 0;
- ``meta.json``: documents, bytes and tokens of every array.

Usage: ``python -m training.prepare CORPUS_FOLDER DATA_FOLDER``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import multiprocessing
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rwkv_runtime.tokenizer import Tokenizer
from training.arrays import save_tokens

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "heldout")
SUFFIX = ".txt.xz"
# GPT-2's pre-tokenisation, with line breaks apart: a token never crosses a word, so the greedy longest match
# finds nearly the pieces that the merges were learnt on.
WORDS = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+"
# Bytes of each source from which merges are learnt: by what the model will read, not by what there is.
SAMPLE_BYTES = 30_000_000
SAMPLE_SHARES: Mapping[str, float] = {"gpt4omini_stories": 0.5, "tinystories_pieces": 0.35}
OTHER_SHARE = 0.05


def is_heldout(document: str, per_cent: int = 1) -> bool:
    """Whether a document belongs to the held-out split: a function of its text alone."""
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 100 < per_cent


def split_documents(text: str) -> Iterator[str]:
    """Documents of a corpus text without the blank lines around; empty and repeated ones are dropped."""
    seen: set[str] = set()
    for document in re.split(rf"^{re.escape(SEPARATOR)}$", text, flags=re.MULTILINE):
        stripped = document.strip("\r\n")
        if stripped and stripped not in seen:
            seen.add(stripped)
            yield stripped


def read_corpus(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Documents of every source of a folder, by source and split.

    Raises:
        FileNotFoundError: the folder holds no ``*.txt.xz``.
    """
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise FileNotFoundError(f"no *{SUFFIX} in {folder}")
    corpus: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for document in split_documents(lzma.decompress(path.read_bytes()).decode("utf-8")):
            splits[SPLITS[is_heldout(document)]].append(document)
        corpus[path.name.removesuffix(SUFFIX)] = splits
    return corpus


def vocabulary_sample(corpus: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    """Training documents to learn merges from: evenly spaced, each source up to its share of bytes."""
    for source, splits in corpus.items():
        documents = splits["train"]
        budget = SAMPLE_BYTES * SAMPLE_SHARES.get(source, OTHER_SHARE)
        stride = max(1, round(sum(map(len, documents)) / budget))
        yield from documents[::stride]


def byte_of_symbol() -> dict[str, int]:
    """The printable symbol of each byte in a byte-level BPE (GPT-2's ``bytes_to_unicode``), inverted."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    symbols = {chr(byte): byte for byte in plain}
    symbols.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return symbols


def learn_vocabulary(documents: Iterator[str], entries: int) -> dict[int, bytes]:
    """Byte-level BPE tokens by id, 1 .. entries - 1; id 0 is left to the end of text."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    trainable = Trainable(BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=entries - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trainable.train_from_iterator(documents, trainer)
    symbols = byte_of_symbol()
    learnt = sorted(trainable.get_vocab().items(), key=lambda item: item[1])
    spelled = [bytes(symbols[symbol] for symbol in token) for token, _ in learnt]
    longer = [token for token in spelled if len(token) > 1]
    tokens = {byte + 1: bytes([byte]) for byte in range(256)}
    tokens.update({257 + rank: token for rank, token in enumerate(longer)})
    return tokens


def encode_documents(vocabulary: Path, documents: Sequence[str]) -> npt.NDArray[np.uint16]:
    """Token ids of documents, each preceded by id 0."""
    tokenizer = Tokenizer.from_file(vocabulary)
    ids: list[int] = []
    for document in documents:
        ids.append(0)
        ids.extend(tokenizer.encode(document))
    return np.asarray(ids, dtype=np.uint16)


def prepare(corpus_folder: Path, data_folder: Path, entries: int, workers: int) -> None:
    """Write vocabulary, token arrays and counts (see the module's text)."""
    data_folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    corpus = read_corpus(corpus_folder)
    vocabulary = data_folder / "vocab.txt"
    Tokenizer.from_tokens(learn_vocabulary(vocabulary_sample(corpus), entries)).to_file(vocabulary)
    print(f"vocabulary written after {time.perf_counter() - started:.0f} s", flush=True)
    meta: dict[str, dict[str, dict[str, int]]] = {}
    with multiprocessing.Pool(workers) as pool:
        for source, splits in corpus.items():
            meta[source] = {}
            for split, documents in splits.items():
                jobs = [(vocabulary, documents[start : start + 200]) for start in range(0, len(documents), 200)]
                tokens = np.concatenate(pool.starmap(encode_documents, jobs))
                save_tokens(data_folder / f"{source}.{split}.npy.xz", tokens)
                meta[source][split] = {
                    "documents": len(documents),
                    "bytes": sum(len(document.encode("utf-8")) for document in documents),
                    "tokens": len(tokens),
                }
                counts = meta[source][split]
                rate = counts["bytes"] / counts["tokens"]
                print(f"{source}.{split}: {counts}, {rate:.2f} bytes a token", flush=True)
    content = {"entries": entries, "sources": meta}
    (data_folder / "meta.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"done after {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the story corpus for training.")
    parser.add_argument("corpus", type=Path, help="folder of *.txt.xz")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--entries", type=int, default=4096, help="vocabulary size, end of text included")
    parser.add_argument("--workers", type=int, default=2, help="processes that encode")
    arguments = parser.parse_args()
    prepare(arguments.corpus, arguments.data, arguments.entries, arguments.workers)


if __name__ == "__main__":
    main()

"""Which vocabulary goes with a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_runtime.errors import VocabularyError
from rwkv_runtime.tokenizer import Tokenizer, load_tokenizer, stat_vocabulary, world_vocabulary

WORLD_SIZES = (65529, 65530, 65536)


def find_vocabulary(path: str | os.PathLike[str], vocab: str | os.PathLike[str] | None, vocab_size: int) -> Path:
    """The file: `vocab`, else `NAME.vocab.txt` beside the checkpoint, else RWKV World's where the model has its size.

    Raises VocabularyError where none fits, saying where it looked, or where it is not there; nothing is read.
    """
    beside = Path(path).with_suffix(".vocab.txt")
    if vocab is not None:
        chosen = Path(vocab)
    elif beside.is_file():
        chosen = beside
    elif vocab_size in WORLD_SIZES:
        chosen = world_vocabulary()
    else:
        raise VocabularyError(
            f"{path}: its vocabulary has {vocab_size:,} entries, which is not RWKV World's, and there is no "
            f"{beside.name} beside it; give the vocabulary file"
        )
    stat_vocabulary(chosen)
    return chosen


def expected_vocabulary(path: str | os.PathLike[str], vocab: str | os.PathLike[str] | None) -> Path:
    """What `find_vocabulary` finds for every model that can be loaded, whose size is not known yet. Raises as it."""
    return find_vocabulary(path, vocab, WORLD_SIZES[0])


def load_vocabulary(file: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model of that size. Raises VocabularyError where the file is malformed or another model's."""
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            f"{file}: has ids up to {tokenizer.vocab_size - 1}, the model only {vocab_size}; it is another model's"
        )
    return tokenizer

"""A byte-level longest-match codec for any RWKV vocabulary file."""

from __future__ import annotations

import ast
import codecs
import functools
import importlib.resources
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from rwkv_runtime.errors import VocabularyError

# Vocabulary files come from strangers; every bound is far above any vocabulary in use.
MAX_FILE_BYTES = 64 * 2**20
MAX_LINE_BYTES = 8192  # an escaped byte takes four characters, so any allowed token fits
MAX_TOKEN_BYTES = 1024
MAX_ID = 2**20 - 1

# Long tokens are looked up by their first bytes; four leave few lengths to try at each place.
PREFIX_BYTES = 4
SHORT_LENGTHS = tuple(range(PREFIX_BYTES, 0, -1))

# A line whose literal needs no unescaping: nearly all of them, so this decides the loading time.
PLAIN_LINE = re.compile(
    rb"""([0-9]{1,9}) (?:'([^'\\\r\n\0]+)'|"([^"\\\r\n\0]+)") ([0-9]{1,9})(?:\r?\n)?""",
)
LINE = re.compile(r"([0-9]{1,9}) (.+) ([0-9]{1,9})(?:\r?\n)?", re.DOTALL)

# One whole literal, and only escapes Python knows: unlike ast.literal_eval alone, nothing nested ever
# reaches the compiler (which can exhaust the stack) and no result depends on the warning filters.
LITERAL = re.compile(
    r"""
    (b)? (?P<quote>['"])
    (?: (?!(?P=quote)) [^\\]
      | \\ (?: [abfnrtvx'"\\] | (?![4-7][0-7]{2})[0-7] | (?(1)(?!)|[NuU]) )
    )*
    (?P=quote)
    """,
    re.VERBOSE,
)


class _TokenBytes(dict[int, bytes]):
    """Token id to bytes; a missing id says so in the runtime's own words."""

    def __missing__(self, token: int) -> bytes:
        raise VocabularyError(f"the vocabulary has no token {token!r}")


class Tokenizer:
    """Text to token ids and back for one vocabulary.

    Made by `from_file` or `from_tokens`; immutable, so threads may share it. Id 0 is end of text and
    belongs to no token. `vocab_size` is the highest id + 1, `tokens` a read-only map from id to bytes.
    """

    vocab_size: int
    tokens: Mapping[int, bytes]

    def __init__(self, tokens: dict[int, bytes], ids: dict[bytes, int]) -> None:
        """Take over tables already validated; callers want `from_file` or `from_tokens`."""
        self.tokens = MappingProxyType(tokens)
        self.vocab_size = max(tokens) + 1
        self._bytes = _TokenBytes(tokens)
        self._bytes[0] = b""
        self._ids = ids
        self._lengths = _lengths_by_prefix(ids)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a vocabulary file; VocabularyError, with the line number, if it is missing or malformed."""
        data = _read(path)
        name = Path(path).name
        return cls(*_validated(_parsed(data, name), name, "line"))

    @classmethod
    def from_tokens(cls, tokens: Mapping[int, bytes]) -> Tokenizer:
        """Use these tokens, id to bytes; VocabularyError where a file with them would be refused."""
        return cls(*_validated(tokens.items(), "tokens", "entry"))

    def absent(self, vocab_size: int | None = None) -> list[int]:
        """Ids from 1 up to, not including, `vocab_size` (by default this vocabulary's) without a token."""
        size = self.vocab_size if vocab_size is None else vocab_size
        return [token for token in range(1, size) if token not in self.tokens]

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the longest matching tokens, left to right, over the UTF-8 bytes of `text`.

        A lone surrogate is encoded as its three bytes ("surrogatepass"): nothing typed is lost, but it
        is not UTF-8, so `decode` shows replacement characters in its place.
        """
        source = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        lengths_of, id_of = self._lengths.get, self._ids.get
        result: list[int] = []
        append = result.append
        start, end = 0, len(source)
        while start < end:
            # Always ends in a match: lengths go down to 1, and every single byte is a token.
            for length in lengths_of(source[start : start + PREFIX_BYTES], SHORT_LENGTHS):
                token = id_of(source[start : start + length])
                if token is not None:
                    append(token)
                    start += length  # past the end if the slice was cut short there
                    break
        return result

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, none for id 0 (end of text); VocabularyError naming an id without a token."""
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, invalid UTF-8 replaced by U+FFFD; VocabularyError as in `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """Start decoding one text token by token."""
        return TextStream(self)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary in RWKV's format, so that `from_file` reads the same tokens back.

        Raises OSError if `path` cannot be written and VocabularyError if the file would be too large.
        """
        lines = (f"{key} {_literal(token)} {len(token)}\n" for key, token in sorted(self.tokens.items()))
        data = "".join(lines).encode("utf-8")
        if len(data) > MAX_FILE_BYTES:
            raise VocabularyError(f"the vocabulary takes more than {MAX_FILE_BYTES} bytes as a file")
        Path(path).write_bytes(data)


class TextStream:
    """Turns tokens into text as they come, holding back a character until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer._bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text `token` completes, maybe ""; VocabularyError for an id without a token."""
        return self._decoder.decode(self._bytes[token])

    def finish(self) -> str:
        """What was held back, as U+FFFD since it can no longer be completed; the stream is then as new."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """`Tokenizer.from_file`, shared by all who ask until the file's path, time or size differs."""
    stat = stat_vocabulary(path)
    return _cached_tokenizer(os.path.realpath(path), stat.st_mtime_ns, stat.st_size)


def stat_vocabulary(path: str | os.PathLike[str]) -> os.stat_result:
    """What the system says of the file. Raises VocabularyError where it is not there."""
    try:
        return os.stat(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


@functools.lru_cache(maxsize=16)
def _cached_tokenizer(path: str, mtime_ns: int, size: int) -> Tokenizer:
    return Tokenizer.from_file(path)


def world_vocabulary() -> Path:
    """Path of the World vocabulary that ships with the runtime (ids 1 to 65529)."""
    return Path(str(importlib.resources.files("rwkv_runtime") / "data" / "rwkv_vocab_v20230424.txt"))


def _unreadable(path: str | os.PathLike[str], error: OSError | ValueError) -> VocabularyError:
    reason = error.strerror if isinstance(error, OSError) else error
    return VocabularyError(f"{os.fspath(path)!r}: cannot read the vocabulary: {reason}")


def _read(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes, refused when they are too many, none, or not UTF-8."""
    try:
        # Opening a pipe or a device could block for ever.
        if os.path.exists(path) and not os.path.isfile(path):
            raise VocabularyError(f"{os.fspath(path)!r}: the vocabulary is not a regular file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    name = Path(path).name
    if len(data) > MAX_FILE_BYTES:
        raise VocabularyError(f"{name}: the file is larger than {MAX_FILE_BYTES} bytes")
    if not data:
        raise VocabularyError(f"{name}: the file is empty")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise VocabularyError(f"{name}, line {line}: the line is not UTF-8") from error
    return data


def _parsed(data: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    """The id and bytes of each line."""
    for number, line in enumerate(io.BytesIO(data), start=1):
        plain = PLAIN_LINE.fullmatch(line) if len(line) <= MAX_LINE_BYTES else None
        if plain:
            key, length, token = int(plain[1]), int(plain[4]), plain[2] or plain[3]
        else:
            key, length, token = _parsed_line(line, f"{name}, line {number}")
        if length != len(token):
            problem = f"the token is {len(token)} bytes long, the line says {length}"
            raise VocabularyError(f"{name}, line {number}: {problem}")
        yield key, token


def _parsed_line(line: bytes, place: str) -> tuple[int, int, bytes]:
    """Id, length and token of a line that is not plain: it has escapes or bytes, or is malformed."""
    if len(line) > MAX_LINE_BYTES:
        raise VocabularyError(f"{place}: the line is longer than {MAX_LINE_BYTES} bytes")
    match = LINE.fullmatch(line.decode("utf-8"))
    if not match:
        raise VocabularyError(f"{place}: the line is not an id, a literal and a length")
    literal = match[2]
    if not LITERAL.fullmatch(literal):
        raise VocabularyError(f"{place}: the token is not a Python str or bytes literal")
    try:
        value: str | bytes = ast.literal_eval(literal)
        token = value.encode("utf-8") if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise VocabularyError(f"{place}: the token is not a valid Python str or bytes literal") from error
    return int(match[1]), int(match[3]), token


def _validated(entries: Iterable[tuple[int, bytes]], name: str, unit: str) -> tuple[dict[int, bytes], dict[bytes, int]]:
    """Entries as id to token and token to id; `name` and `unit` say in messages where an entry is."""
    tokens: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for number, (key, token) in enumerate(entries, start=1):
        problem = None
        if type(key) is not int or not 1 <= key <= MAX_ID:  # 0 is end of text
            problem = f"the id {key!r} is not a whole number from 1 to {MAX_ID}"
        elif type(token) is not bytes or not 1 <= len(token) <= MAX_TOKEN_BYTES:
            problem = f"the token is not 1 to {MAX_TOKEN_BYTES} bytes"
        elif key in tokens:
            problem = f"the id {key} is there twice"
        elif token in ids:
            problem = f"the token is already that of id {ids[token]}"
        if problem:
            raise VocabularyError(f"{name}, {unit} {number}: {problem}")
        tokens[key] = token
        ids[token] = key
    for byte in range(256):
        if bytes((byte,)) not in ids:
            raise VocabularyError(f"{name}: the single byte 0x{byte:02x} has no token")
    return tokens, ids


def _lengths_by_prefix(tokens: Iterable[bytes]) -> dict[bytes, tuple[int, ...]]:
    """For the first bytes of each long token, every length to try there, longest first."""
    lengths: dict[bytes, set[int]] = {}
    for token in tokens:
        if len(token) > PREFIX_BYTES:
            lengths.setdefault(token[:PREFIX_BYTES], set()).add(len(token))
    return {prefix: (*sorted(found, reverse=True), *SHORT_LENGTHS) for prefix, found in lengths.items()}


def _literal(token: bytes) -> str:
    """The token as RWKV's files write it: a str literal if it is UTF-8 by itself, else a bytes literal."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)

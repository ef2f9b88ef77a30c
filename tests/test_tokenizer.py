"""What the tokenizer promises, sentence by sentence."""

from __future__ import annotations

import ast
import os
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_runtime import tokenizer as module
from rwkv_runtime.errors import VocabularyError
from rwkv_runtime.tokenizer import Tokenizer, load_tokenizer, world_vocabulary

BYTES = {byte + 1: bytes((byte,)) for byte in range(256)}
BYTE_LINES = [f"{key} {token!r} 1" for key, token in BYTES.items()]
HARD = [
    "The quick brown fox jumps over the lazy dog.\r\n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳",
    "我能吞下玻璃而不伤身体。日本語とひらがな 한국어",
    "e\u0301 Z\u0351\u036b\u0343 n\u0303o\u0308",
    "שלום עולם \u202eمرحبا\u202c",  # noqa: RUF001
    " \t\n  \r\n\t\t   \u00a0\u2003\u2028\u2029\ufeff",
    "\ufffd and \ufffd\ufffd \0\0a\0",
    "a" * 3000 + " " * 3000 + "=" * 3001 + "😀" * 500,
    "'\"\\x00 b'\\xff' \\",
]
HARD_BYTES = [b"\xff\xfe", b"\xe4\xb8", b"\xf0\x9f\x98", b"a\x80\xc0\xaf", b"\xed\xa0\x80", bytes(range(256))]


def naive(tokens: Mapping[int, bytes], source: bytes) -> list[int]:
    """Greedy longest match, as plainly as it can be said."""
    result = []
    while source:
        length, key = max((len(token), key) for key, token in tokens.items() if source.startswith(token))
        result.append(key)
        source = source[length:]
    return result


def write(path: Path, *extra: str, newline: str = "\n") -> Path:
    """A vocabulary of the 256 single bytes and these further lines."""
    path.write_bytes("".join(line + newline for line in (*BYTE_LINES, *extra)).encode("utf-8"))
    return path


def refusal(path: str | os.PathLike[str]) -> str:
    with pytest.raises(VocabularyError):
        load_tokenizer(path)
    with pytest.raises(VocabularyError) as caught:
        Tokenizer.from_file(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def world() -> Tokenizer:
    return load_tokenizer(world_vocabulary())


def test_world_is_complete_and_written_as_it_was_read(world: Tokenizer, tmp_path: Path) -> None:
    assert world.vocab_size == 65530
    assert list(world.tokens) == list(range(1, 65530))
    assert all(world.tokens[byte + 1] == bytes((byte,)) for byte in range(256))
    assert max(map(len, world.tokens.values())) == 128
    world.to_file(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == world_vocabulary().read_bytes().replace(b"\r\n", b"\n")


def test_ids_a_model_has_and_the_vocabulary_lacks_are_listed_as_absent(world: Tokenizer) -> None:
    assert world.absent() == []
    assert world.absent(65536) == [65530, 65531, 65532, 65533, 65534, 65535]
    assert Tokenizer.from_tokens({**BYTES, 260: b"ab"}).absent() == [257, 258, 259]
    assert world.absent(1) == world.absent(0) == []


def test_world_ids_are_those_of_the_rwkv_package_on_any_bytes(world: Tokenizer) -> None:
    reference = pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(world_vocabulary()))
    assert reference.idx2token == dict(world.tokens)
    sources = [*map(str.encode, HARD), *HARD_BYTES]
    rng = random.Random(20230424)
    tokens = list(world.tokens.values())
    for _ in range(1000):
        noise = rng.randbytes(rng.randrange(40))
        # Pieces of tokens reach the long matches that noise never does.
        pieces = b"".join(t[: rng.randrange(1, len(t) + 1)] for t in rng.choices(tokens, k=12))
        text = "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(128)))) for _ in range(20))
        sources += (noise, pieces, text.encode())
    for source in sources:
        assert world.encode(source) == reference.encodeBytes(source)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_get_the_ids_of_the_plain_algorithm_and_come_back_from_them(source: bytes) -> None:
    world = load_tokenizer(world_vocabulary())
    pieces = {source[i : i + n] for i in range(len(source)) for n in range(1, 129)}
    ids = world.encode(source)
    assert ids == naive({key: token for key, token in world.tokens.items() if token in pieces}, source)
    assert world.decode_bytes(ids) == source


@pytest.mark.parametrize("text", ["", *HARD])
def test_any_text_comes_back_from_its_ids(world: Tokenizer, text: str) -> None:
    assert world.decode(world.encode(text)) == text
    assert world.encode(text) == world.encode(text.encode("utf-8"))


def test_a_lone_surrogate_keeps_its_three_bytes_and_decodes_as_replaced(world: Tokenizer) -> None:
    ids = world.encode("a\ud800b")
    assert world.decode_bytes(ids) == b"a\xed\xa0\x80b"
    assert world.decode(ids) == "a\ufffd\ufffd\ufffdb"


def test_id_zero_is_end_of_text_and_decodes_to_nothing(world: Tokenizer) -> None:
    assert 0 not in world.tokens
    assert world.decode_bytes([0, *world.encode("hi"), 0]) == b"hi"
    assert world.stream().push(0) == ""


@pytest.mark.parametrize("token", [-1, 65530, 2**40])
def test_an_id_without_a_token_is_refused_by_name(world: Tokenizer, token: int) -> None:
    for decode in (lambda: world.decode_bytes([1, token]), lambda: world.stream().push(token)):
        with pytest.raises(VocabularyError, match=f"no token {token}$"):
            decode()


def test_the_token_map_is_read_only_and_not_the_callers() -> None:
    given_tokens = dict(BYTES)
    tokenizer = Tokenizer.from_tokens(given_tokens)
    given_tokens[300] = b"late"
    assert 300 not in tokenizer.tokens
    with pytest.raises(TypeError):
        tokenizer.tokens[300] = b"late"  # type: ignore[index]


# Few letters, so that tokens overlap and are prefixes of each other.
letters = st.lists(st.sampled_from(b"ab\xe4\xb8"), min_size=1, max_size=12).map(bytes)
extra_tokens = st.sets(letters.filter(lambda token: len(token) > 1), max_size=20)


@given(extra_tokens, st.lists(letters, max_size=12).map(b"".join), st.binary(max_size=8))
def test_small_vocabularies_match_the_plain_algorithm(extra: set[bytes], source: bytes, tail: bytes) -> None:
    tokenizer = Tokenizer.from_tokens({**BYTES, **dict(enumerate(sorted(extra), start=400))})
    for text in (source, source + tail):
        assert tokenizer.encode(text) == naive(tokenizer.tokens, text)
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text


sampled = st.lists(st.integers(0, 65529), max_size=30)
any_bytes = st.binary(max_size=60) | st.text().map(str.encode)


@given(sampled | any_bytes.map(lambda source: [byte + 1 for byte in source]))
def test_streaming_token_by_token_gives_exactly_the_decoded_text(ids: list[int]) -> None:
    world = load_tokenizer(world_vocabulary())
    stream = world.stream()
    assert "".join([stream.push(token) for token in ids]) + stream.finish() == world.decode(ids)


def test_a_character_appears_with_the_token_that_completes_it_and_u_fffd_is_one(world: Tokenizer) -> None:
    stream = world.stream()
    assert [stream.push(byte + 1) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert "".join(map(stream.push, world.encode("\ufffd"))) == "\ufffd"
    assert stream.push(ord("x") + 1) == "x"
    assert stream.finish() == ""
    # Cut off inside a character: shown replaced, and the stream starts afresh.
    assert stream.push(0xF0 + 1) + stream.finish() == "\ufffd"
    assert stream.push(ord("x") + 1) == "x"


# The longest allowed tokens, in the widest escapes.
@example({content * (module.MAX_TOKEN_BYTES // 4) for content in (b"\0" * 4, b"\xff" * 4, b"\n'\"\\")})
@given(st.sets(st.binary(min_size=2) | st.text(min_size=2).map(str.encode), max_size=15))
def test_any_vocabulary_written_is_read_back_the_same(extra: set[bytes]) -> None:
    tokenizer = Tokenizer.from_tokens({**BYTES, **dict(enumerate(sorted(extra), start=1000))})
    with TemporaryDirectory() as folder:
        tokenizer.to_file(Path(folder, "v.txt"))
        assert Tokenizer.from_file(Path(folder, "v.txt")).tokens == tokenizer.tokens


LITERALS = [
    *("'it is'", '"it\'s"', "'say \"x\"'", r"'it\'s \"x\"'", r"'\\n'", r"'\t\r\n\x00\x7f'", "' 5 '"),
    *(r"'\u00e9\U0001f600\N{BULLET}'", "'é😀'", "'\u2028\x85\x0b\x0c'", r"b'\xff\xfe\''", r"'\1017'"),
]


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_literal_means_what_python_says_it_means(tmp_path: Path, literal: str, newline: str) -> None:
    value = ast.literal_eval(literal)
    token = value.encode() if isinstance(value, str) else value
    path = write(tmp_path / "v.txt", f"300 {literal} {len(token)}", newline=newline)
    assert Tokenizer.from_file(path).tokens == {**BYTES, 300: token}
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))  # the last line needs no line end
    assert Tokenizer.from_file(path).tokens == {**BYTES, 300: token}


REFUSED = {
    "the token is 3 bytes long, the line says 4": ["300 'abc' 4", "300 'éb' 4"],
    "the token is not 1 to 1024 bytes": ["300 '' 0", f"300 '{'a' * 1025}' 1025"],
    "the line is longer than 8192 bytes": [f"300 '{'a' * 9000}' 9000", f"300 '{'é' * 4100}' 8200"],
    "the id 0 is not a whole number from 1 to 1048575": ["0 'ab' 2"],
    "the id 1048576 is not a whole number from 1 to 1048575": ["1048576 'ab' 2"],
    "the id 7 is there twice": ["7 'ab' 2"],
    "the token is already that of id 98": ["300 'a' 1", r"300 '\x61' 1", "300 b'a' 1"],
    "the line is not an id, a literal and a length": [
        *("", "300", "300 'ab'", "-3 'ab' 2", "3_0 'ab' 2", "٣ 'ab' 2", "300 '' ", f"{'9' * 5000} 'ab' 2"),
    ],
    "the token is not a Python str or bytes literal": [
        *("300 ab 2", "300 12 2", "300 ['a'] 1", "300 'a'*2 2", "300 __import__('os').getcwd() 1"),
        *("300 'ab 2", "300 'a'b' 3", r"300 'ab\' 2", r"300 '\d' 2", r"300 '\777' 2", r"300 b'\u0041' 6"),
        *(f"300 {'[' * 4000}{']' * 4000} 1", f"300 {'(' * 8000} 1", f"300 {'-' * 8000}1 1"),
    ],
    "the token is not a valid Python str or bytes literal": [
        *(r"300 '\xg0' 1", r"300 '\ud800' 3", "300 b'é' 2", "300 'a\0b' 3", "300 'a\rb' 3"),
    ],
}


@pytest.mark.parametrize(("problem", "line"), [(why, line) for why in REFUSED for line in REFUSED[why]])
def test_a_malformed_line_is_refused_by_its_number(tmp_path: Path, problem: str, line: str) -> None:
    path = write(tmp_path / "world.txt", line, "301 'fine' 4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(path) == f"world.txt, line 257: {problem}"


@pytest.mark.parametrize("error", [MemoryError, RecursionError, ValueError, SyntaxError])
def test_a_literal_that_python_gives_up_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def give_up(literal: str) -> str:
        raise error(literal)

    monkeypatch.setattr(ast, "literal_eval", give_up)
    assert refusal(write(tmp_path / "v.txt")).startswith("v.txt, line 1: the token is not a valid Python")


def test_what_is_no_file_or_no_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(path).endswith("v.txt': cannot read the vocabulary: No such file or directory")
    assert "cannot read the vocabulary" in refusal("a\0b")
    assert refusal(tmp_path).endswith("the vocabulary is not a regular file")
    assert refusal(tmp_path / "pipe").endswith("the vocabulary is not a regular file")
    path.touch()
    assert refusal(path) == "v.txt: the file is empty"
    path.write_bytes(write(path).read_bytes() + b"300 'a\xff' 2\n")
    assert refusal(path) == "v.txt, line 257: the line is not UTF-8"
    path.write_text("\n".join(BYTE_LINES[:0x80]))
    assert refusal(path) == "v.txt: the single byte 0x80 has no token"
    with pytest.raises(VocabularyError, match="tokens: the single byte 0x00 has no token"):
        Tokenizer.from_tokens({})


def test_a_file_larger_than_the_bound_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "v.txt")
    size = path.stat().st_size
    monkeypatch.setattr(module, "MAX_FILE_BYTES", size)
    tokenizer = Tokenizer.from_file(path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", size - 1)
    assert refusal(path) == f"v.txt: the file is larger than {size - 1} bytes"
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(VocabularyError, match="more than 1000 bytes"):
        tokenizer.to_file(tmp_path / "new.txt")
    assert not (tmp_path / "new.txt").exists()


NO_ID, NO_TOKEN = "is not a whole number from 1", "the token is not 1 to 1024 bytes"
GIVEN = [({0: b"ab"}, NO_ID), ({True: b"ab"}, NO_ID), ({"300": b"ab"}, NO_ID), ({2**20: b"ab"}, NO_ID)]
GIVEN += [({300: b""}, NO_TOKEN), ({300: "ab"}, NO_TOKEN), ({300: b"a" * 1025}, NO_TOKEN)]
GIVEN += [({300: b"ab", 301: b"ab"}, "the token is already that of id 300")]


@pytest.mark.parametrize(("tokens", "problem"), GIVEN)
def test_tokens_given_directly_are_checked_like_a_file(tokens: dict[int, bytes], problem: str) -> None:
    with pytest.raises(VocabularyError, match=f"^tokens, entry [0-9]+: .*{problem}"):
        Tokenizer.from_tokens({**tokens, **{key: token for key, token in BYTES.items() if key not in tokens}})


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path) -> None:
    first = load_tokenizer(path := write(tmp_path / "v.txt"))
    (tmp_path / "link.txt").symlink_to(path)
    assert load_tokenizer(str(path)) is first
    assert load_tokenizer(tmp_path / "link.txt") is first
    write(path, "300 'ab' 2")
    second = load_tokenizer(path)
    assert second.tokens[300] == b"ab"
    os.utime(path, ns=(1, 1))
    assert load_tokenizer(path) is not second

"""Text to ids of RWKV World's vocabulary and back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.arena import Arena
from benchmarks.package import PACKAGE, why_no_package
from benchmarks.timing import race, record
from rwkv_runtime.tokenizer import Tokenizer, load_tokenizer, world_vocabulary

OURS, RUST = "rwkv-runtime", "pyrwkv-tokenizer"
SENTENCES = (
    "The old lighthouse keeper counted the ships that came home before the storm, and there was one too few. ",
    "In 1984 about 3,700 people lived there; by 2021 it was 12,954, most of them in the new town by the river.\n",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values) if values else 0.0\n",
    "Les enfants couraient vers la mer, où l'eau était déjà froide à la fin de l'été. ",
    "Вечером они сидели у окна и молча смотрели на снег. ",  # noqa: RUF001
    "春天来了，山里的花都开了，孩子们在河边放风筝。",  # noqa: RUF001
    "駅前の小さな店で、毎朝おなじ時間にコーヒーを飲む。",
    "Done! ✅ 🎉 (see issue #42 — thanks 👋)\n\n",
)
Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


@pytest.fixture(scope="session")
def text(arena: Arena) -> str:
    chosen = random.Random(0).choices(SENTENCES, k=50 if arena.settings.smoke else 3000)
    return "".join(chosen)


@pytest.fixture(scope="session")
def codecs() -> dict[str, Codec | str]:
    """Encode and decode of each program, or the reason it is not here."""
    ours = load_tokenizer(world_vocabulary())
    found: dict[str, Codec | str] = {OURS: (ours.encode, ours.decode), PACKAGE: why_no_package() or package_codec()}
    try:
        from pyrwkv_tokenizer import RWKVTokenizer
    except ImportError:
        found[RUST] = f"{RUST} is not installed"
    else:
        rust = RWKVTokenizer()
        found[RUST] = (rust.encode, rust.decode)
    return found


def package_codec() -> Codec:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    theirs = TRIE_TOKENIZER(str(world_vocabulary()))
    return theirs.encode, theirs.decode


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("which", [OURS, RUST, PACKAGE])
def test_tokenizer(
    benchmark: BenchmarkFixture, arena: Arena, codecs: dict[str, Codec | str], text: str, direction: str, which: str
) -> None:
    codec, rival = codecs[which], codecs[PACKAGE]
    if isinstance(codec, str):
        pytest.skip(codec)
    ids = load_tokenizer(world_vocabulary()).encode(text)
    assert codec[0](text) == ids, f"{which} gives other ids"
    assert codec[1](ids) == text, f"{which} does not give the text back"
    benchmark.group = f"5 tokenizer {direction}"

    def step(pair: Codec) -> Callable[[], object]:
        return (lambda: pair[0](text)) if direction == "encode" else (lambda: pair[1](ids))

    against = None if which == PACKAGE or isinstance(rival, str) else step(rival)
    timing = race(benchmark, arena, step(codec), against, rounds=10)
    megabytes = len(text.encode()) / 1e6
    record(benchmark, arena, f"tokenizer {direction}", which, timing, megabytes_per_second=megabytes / timing.p50)


@pytest.mark.parametrize("which", [OURS, PACKAGE])
def test_load_vocabulary(benchmark: BenchmarkFixture, arena: Arena, which: str) -> None:
    if which == PACKAGE and (reason := why_no_package()):
        pytest.skip(reason)
    benchmark.group = "5 tokenizer load"
    path = world_vocabulary()
    rival = None if which == PACKAGE or why_no_package() else package_codec
    step = package_codec if which == PACKAGE else (lambda: Tokenizer.from_file(path))
    record(benchmark, arena, "tokenizer load", which, race(benchmark, arena, step, rival, rounds=3))

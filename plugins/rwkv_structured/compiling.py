"""From the texts of a request to a compiled grammar, or to a refusal in bounded time."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakMethod

from rwkv_runtime import OptionError, Tokenizer
from rwkv_structured.schema import check_embedded, check_schema

KINDS = ("json_schema", "regex", "grammar")
MAX_BYTES = 2**17
SECONDS = 0.4
"""For a trial; the second compilation, in this process, takes as long at most."""
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    # A blank after a comma or a colon, or none: with any whitespace a model may never stop writing blanks.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No \uXXXX: with it, a name could be spelt in a second way and so escape its property's schema.
    "json_allowed_escapes": 'nrbtf\\"',
}


def llguidance() -> ModuleType:
    """The library, loaded when it is first needed. Raises OptionError where it is not installed."""
    try:
        return import_module("llguidance")
    except ImportError:
        raise OptionError("structured output needs llguidance; install rwkv-runtime[structured]") from None


def grammar_of(texts: Mapping[str, str]) -> str | None:
    """llguidance's grammar for the one text that is given; None for none. Raises OptionError."""
    given = [kind for kind in KINDS if texts.get(kind)]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} exclude each other")
    if not given:
        return None
    (kind,) = given
    text = texts[kind]
    _check_size(kind, text)
    if kind != "regex" and not _is_source(kind, text):
        text = _read(kind, text)
        _check_size(kind, text)
    grammar = _translated(kind, text)
    _try_out(kind, grammar)
    return grammar


def _check_size(kind: str, text: str) -> None:
    """Before anything looks at it that takes longer than reading it once."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise OptionError(f"{kind}: character {error.start + 1} is not Unicode text") from None
    if size > MAX_BYTES:
        raise OptionError(f"{kind}: longer than {MAX_BYTES} bytes")


def _is_source(kind: str, text: str) -> bool:
    """Whether this is the schema or the grammar itself, not the name of a file with it."""
    if kind == "json_schema":
        return text.lstrip().startswith("{")
    return any(re.search(r"\bstart\b", line.rpartition(":")[0]) for line in text.split("\n"))


def _read(kind: str, name: str) -> str:
    try:
        path = Path(name)
        if path.exists() and not path.is_file():  # a pipe or a device could block for ever
            raise OptionError(f"{kind}: {name!r} is not a regular file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"{kind}: {name!r} is not UTF-8, or longer than {MAX_BYTES} bytes") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"{kind}: cannot read {name[:200]!r}: {reason}") from None


def _translated(kind: str, text: str) -> str:
    """What the matcher takes; a schema or grammar that would not be kept to is refused."""
    make = llguidance().LLMatcher
    if kind == "json_schema":
        check_schema(text)
    elif kind == "grammar":
        check_embedded(text)
    try:
        if kind == "json_schema":
            return str(make.grammar_from_json_schema(text, overrides=JSON_OPTIONS))
        return str(make.grammar_from_lark(text) if kind == "grammar" else make.grammar_from_regex(text))
    except ValueError as error:  # its JSON parser takes less nesting than newer Pythons' do
        raise OptionError(f"{kind}: {str(error)[:200]}") from None


@functools.lru_cache(maxsize=64)  # the next request often brings the same text; refusals are not kept
def _try_out(kind: str, grammar: str) -> None:
    """Compiles the grammar in another process. Raises OptionError where that fails, crashes or takes too long."""
    home = Path(str(llguidance().__file__)).parents[1]
    settings = json.dumps({"path": str(home), "limits": LIMITS})
    words = [sys.executable, "-I", "-S", str(Path(__file__).with_name("trial.py")), settings]
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    except OSError as problem:
        raise OptionError(f"structured output tries each text in a process of its own: {problem}") from None
    with child:
        try:
            assert child.stdout is not None
            ready = child.stdout.readline()
            error, _ = child.communicate(grammar.encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise OptionError(f"{kind}: too complex; it takes more than {SECONDS} s to compile") from None
        finally:
            child.kill()
    if not ready:
        raise OptionError(f"structured output tries each text in a process of its own; {sys.executable} runs none")
    if child.returncode:
        raise OptionError(f"{kind}: too complex; nested too deeply")
    if error:
        raise OptionError(f"{kind}: {reason(error.decode('utf-8', 'replace'))}")


def reason(error: str) -> str:
    """llguidance's error in one line."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # what a regex has wrong
    text = ": ".join([*(line.rstrip(":") for line in lines[:1]), *named[:1]])
    return "nothing can satisfy it" if text.startswith("NoExtension") else text[:300]


def compiled_vocabulary(tokenizer: Tokenizer) -> Any:
    """llguidance's form of a vocabulary: 0.1 s and 24 MB for World's 65529 tokens, so made once."""

    class Source:
        """What TokenizerWrapper asks for."""

        eos_token_id = 0
        bos_token_id = None
        special_token_ids = [0]
        tokens = [tokenizer.tokens.get(token, b"") for token in range(tokenizer.vocab_size)]
        encode = WeakMethod(tokenizer.encode)  # so that the tokenizer's owner can let go of it

        def __call__(self, text: str | bytes) -> list[int]:
            encode = self.encode()
            return encode(text) if encode else []

    library = llguidance()
    wrapped = library.TokenizerWrapper(Source())
    return library.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, eos_token=0)


def matcher_of(grammar: str, vocabulary: Any) -> Any:
    """A matcher at the start of a text. Raises OptionError."""
    library = llguidance()
    limits = library.LLParserLimits(**LIMITS)
    matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise OptionError(reason(matcher.get_error()))
    return matcher

"""Compiles a grammar in a process of its own, which may crash or hang instead of ours.

llguidance counts what it spends, but not everywhere: long chains of rules or references overflow the stack, and
some small texts keep it busy for minutes. So every new text is tried here first, with less stack than ours has.
Run by `compiling.py` as a script, with the limits and where llguidance lies as a JSON argument: it writes one
line when it is ready, then reads the grammar and writes the error, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

STACK_BYTES = 2 * 2**20
STEPS = 3  # the first tokens unfold most of a grammar


def attempt(grammar: str, limits: dict[str, Any]) -> str:
    """The error of the first steps with this grammar over single bytes, or ""."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**limits))
    for _ in range(STEPS):
        allowed = matcher.compute_logit_bias()
        if matcher.is_stopped():
            break
        matcher.consume_token(max(range(len(allowed)), key=allowed.__getitem__))
    return str(matcher.get_error()) if matcher.is_error() else ""


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path.append(settings["path"])
    import llguidance  # noqa: F401  (before the clock of the other side starts)

    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    grammar = sys.stdin.buffer.read().decode()

    def run() -> None:
        sys.stdout.buffer.write(attempt(grammar, settings["limits"]).encode("utf-8", "replace"))

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()

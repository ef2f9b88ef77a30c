"""Text that keeps to a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rwkv_runtime import Controls, OptionError, Param, Sampler, Tokenizer, hookimpl
from rwkv_structured.compiling import KINDS, compiled_vocabulary, grammar_of, matcher_of, reason

MATCHER, MASK = "structured.matcher", "structured.mask"
"""What a row's notes hold beside the texts: where it stands, and the ids it may draw next, bool [V]."""


class Structured(Sampler):
    name = "structured"
    summary = "text that keeps to a JSON schema, a regular expression or a grammar; the first stage of a chain"
    params = {
        "json_schema": Param("", help="a JSON schema, or the name of a file with one", off=""),
        "regex": Param("", help="a regular expression for the whole text", off=""),
        "grammar": Param("", help="a grammar in llguidance's Lark dialect, or the name of a file with one", off=""),
    }
    runs = "host"

    def __init__(self) -> None:
        self._vocabularies: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()

    def check(self, params: Mapping[str, float | str]) -> None:
        grammar_of({kind: str(params[kind]) for kind in KINDS})

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        note = controls.notes[0]
        grammar = grammar_of({kind: note.get(kind, "") for kind in KINDS})
        if grammar is None:
            return
        tokenizer = controls.tokenizer
        if tokenizer is None:
            raise OptionError("structured output needs the vocabulary, which is not known here")
        if tokenizer not in self._vocabularies:
            self._vocabularies[tokenizer] = compiled_vocabulary(tokenizer)
        matcher = matcher_of(grammar, self._vocabularies[tokenizer])
        mask = _mask(matcher, controls.ids.shape[1])
        if matcher.is_error():
            raise OptionError(reason(matcher.get_error()))
        note |= {MATCHER: matcher, MASK: mask}

    def prepare(self, controls: Controls) -> None:
        for note in controls.notes:
            if MATCHER in note and MASK not in note:
                note[MASK] = _mask(note[MATCHER], controls.ids.shape[1])

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        self.prepare(controls)  # for callers that did not
        bound = [row for row, note in enumerate(controls.notes) if MASK in note]
        if not bound:
            return logits
        kept = logits.clone()
        for row in bound:
            kept[row].masked_fill_(~controls.notes[row][MASK], -torch.inf)
        return kept

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        for note, token in zip(controls.notes, tokens.tolist(), strict=True):
            if MATCHER in note:
                note.pop(MASK, None)
                if token >= 0 and not note[MATCHER].is_stopped():
                    note[MATCHER].consume_token(token)


def _mask(matcher: Any, vocab_size: int) -> Tensor:
    """The ids that may come next, bool [V]: none once the matcher has given up, which fails the row."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
    if not matcher.is_error():
        mask[: len(bias)] = bias > 0
    return mask


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Structured()]

"""DRY: lowers the token that would go on repeating what the text has said before."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rwkv_runtime import Controls, Param, Sampler, TensorSpec, Tokenizer, hookimpl
from rwkv_samplers.selection import bounded

WINDOW = 1024
"""How many of the latest tokens a row remembers."""
TABLES = 8
"""How many settings of `dry_breakers` are kept ready for a vocabulary."""
HARSHEST = 1e30
"""A penalty beyond any logit, with room below it in float32."""


class Dry(Sampler):
    """P. E. Weidmann's Don't Repeat Yourself (text-generation-webui, pull request 5677, 2024).

    Where the last n tokens stand earlier in the text, and n >= allowed, the token that followed them there loses
    m b^(n - allowed); n is the longest such. Tokens that hold one of the characters of `dry_breakers` end every
    sequence: none is matched across them.
    """

    name = "dry"
    summary = "lowers tokens that would continue a repetition of the text, the longer it is the more"
    params = {
        "dry_multiplier": Param(0.8, 0.0, 100.0, "what is taken off for a repetition of the allowed length", off=0.0),
        "dry_base": Param(1.75, 1.0, 10.0, "by what it grows for each token more"),
        "dry_allowed_length": Param(2, 1, WINDOW, "length from which a repetition is lowered"),
        "dry_window": Param(WINDOW, 0, WINDOW, "how many of the latest tokens are looked at", off=0),
        "dry_breakers": Param('\n:"*', help="characters that no repetition reaches across"),
    }
    runs = "graph"

    def __init__(self) -> None:
        self._breaks: WeakKeyDictionary[Tokenizer, dict[tuple[bytes, int], Tensor]] = WeakKeyDictionary()

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {
            "dry_text": TensorSpec((WINDOW,), torch.int64),  # the latest tokens plus 1, the last one last; 0 is none
            "dry_match": TensorSpec((WINDOW,), torch.int64),  # how many tokens up to here equal those up to the last
            "dry_breaks": TensorSpec((vocab_size,), torch.bool),
        }

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        text, match, breaks = (controls.slots[name][0] for name in self.slots(0))
        characters = str(controls.notes[0].get("dry_breakers", "")).encode()
        if characters and controls.tokenizer is not None:
            breaks.copy_(self._breaking(controls.tokenizer, characters, len(breaks)))
        latest = tokens[-WINDOW:].tolist()
        if latest:
            ends = breaks[tokens[-WINDOW:]].tolist()
            text[-len(latest) :] = tokens[-WINDOW:] + 1
            lengths = _lengths([None if end else token for token, end in zip(latest, ends, strict=True)])
            match[-len(latest) :] = torch.tensor(lengths, device=match.device)

    def _breaking(self, tokenizer: Tokenizer, characters: bytes, vocab_size: int) -> Tensor:
        """Which tokens hold one of these bytes, bool [V]; made once, as it takes a look at every token."""
        known, key = self._breaks.setdefault(tokenizer, {}), (characters, vocab_size)
        if key not in known:
            table = torch.zeros(vocab_size, dtype=torch.bool)
            table[_holding(tokenizer, characters, vocab_size)] = True
            if len(known) >= TABLES:
                known.pop(next(iter(known)))
            known[key] = table
        return known[key]

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        text, match = controls.slots["dry_text"], controls.slots["dry_match"]
        places = torch.arange(1, WINDOW + 1, device=text.device) - (WINDOW - controls["dry_window"])  # [B, W]
        # The token after each match, and its length within the window; the last token is followed by none yet.
        longest = torch.zeros((len(text), logits.shape[-1] + 1), dtype=torch.int64, device=text.device)
        lengths = torch.minimum(match, places.clamp(min=0))[:, :-1]
        longest = longest.scatter_reduce(-1, text[:, 1:], lengths, "amax")[:, 1:]  # [B, V]
        beyond = longest - controls["dry_allowed_length"]
        growth = (controls["dry_base"] ** beyond.clamp(min=0)).clamp(max=HARSHEST)
        penalty = (controls["dry_multiplier"] * growth).masked_fill(beyond < 0, 0.0)
        return bounded(logits, logits - penalty)

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        text, match, breaks = (controls.slots[name] for name in self.slots(0))
        token = tokens[:, None]
        ends = (token < 0) | breaks.gather(-1, token.clamp(min=0))
        # Where the new token stands after a match, the match is one longer; everywhere else it is over.
        grown = torch.where((text == token + 1) & ~ends, match.roll(1, dims=-1) + 1, 0)
        first = torch.arange(WINDOW, device=text.device) == 0
        grown = torch.where(first & (grown > 0), 1, grown)  # nothing is remembered before the first
        text.copy_(torch.cat([text[:, 1:], token + 1], dim=-1))
        match.copy_(torch.cat([grown[:, 1:], torch.zeros_like(token)], dim=-1))


def _holding(tokenizer: Tokenizer, characters: bytes, vocab_size: int) -> list[int]:
    """Ids of the tokens that hold one of these bytes."""
    wanted, absent = set(characters), set(tokenizer.absent(vocab_size))
    return [i for i in range(vocab_size) if i not in absent and wanted.intersection(tokenizer.decode_bytes([i]))]


def _lengths(text: Sequence[int | None]) -> list[int]:
    """For each place of a text, how many tokens up to it equal those up to the last; None equals nothing.

    The Z-algorithm (Gusfield, 1997), from the end: each token is compared once.
    """
    turned = list(reversed(text))
    lengths = [0] * len(turned)
    left = right = 0  # the stretch that reaches farthest and equals the beginning
    for i in range(1, len(turned)):
        n = min(right - i, lengths[i - left]) if i < right else 0
        while i + n < len(turned) and turned[n] is not None and turned[n] == turned[i + n]:
            n += 1
        lengths[i] = n
        if i + n > right:
            left, right = i, i + n
    return lengths[::-1]


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [Dry()]

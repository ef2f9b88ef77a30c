"""Logits that the user changes, and tokens that the user forbids, by id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rwkv_runtime import Controls, OptionError, Param, Sampler, TensorSpec, hookimpl
from rwkv_samplers.selection import bounded


class LogitBias(Sampler):
    """OpenAI's `logit_bias`: a number for each token, added to its logit."""

    name = "logit-bias"
    summary = "adds a number to the logits of some tokens"
    params = {"bias": Param("", help="token ids and what is added, as in 13:-1.5,20:2", off="")}
    runs = "graph"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {"bias": TensorSpec((vocab_size,), torch.float32)}

    def check(self, params: Mapping[str, float | str]) -> None:
        for _ in _biases(params["bias"]):
            continue

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        bias = controls.slots["bias"]  # [1, V]
        for token, amount in _biases(controls.notes[0]["bias"], bias.shape[1]):
            bias[0, token] = amount

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return bounded(logits, logits + controls.slots["bias"])


class Banned(Sampler):
    """A text whose every token is banned fails; none of them is drawn."""

    name = "banned"
    summary = "never draws some tokens"
    params = {"banned": Param("", help="token ids, as in 13,20", off="")}
    runs = "graph"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {"banned": TensorSpec((vocab_size,), torch.bool)}

    def check(self, params: Mapping[str, float | str]) -> None:
        for item in _items(params["banned"]):
            _token_id("banned", item)

    def prime(self, tokens: Tensor, controls: Controls) -> None:
        banned = controls.slots["banned"]  # [1, V]
        for item in _items(controls.notes[0]["banned"]):
            banned[0, _token_id("banned", item, banned.shape[1])] = True

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        # What is not a number stays, so that the draw after this refuses the row.
        return logits.masked_fill(controls.slots["banned"] & ~logits.isnan(), -torch.inf)


def _biases(text: float | str, vocab_size: int | None = None) -> Iterator[tuple[int, float]]:
    """Each token id with what is added to its logit. Raises OptionError."""
    for item in _items(text):
        token, colon, amount = item.partition(":")
        try:
            value = float(amount)
        except ValueError:
            value = math.nan
        if not colon or not math.isfinite(value):
            raise OptionError(f"bias is a list like 13:-1.5,20:2, and {item!r} is no token id with a number")
        yield _token_id("bias", token, vocab_size), value


def _items(text: float | str) -> list[str]:
    return [item.strip() for item in str(text).split(",") if item.strip()]


def _token_id(option: str, text: str, vocab_size: int | None = None) -> int:
    """Raises OptionError for what is no token id, of this vocabulary or of any."""
    token = int(text) if text.strip().isascii() and text.strip().isdigit() and len(text) < 12 else -1
    if token < 0 or (vocab_size is not None and token >= vocab_size):
        last = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise OptionError(f"{option} names token ids from 0{last}, and {text!r} is none")
    return token


@hookimpl
def rwkv_samplers() -> list[Sampler]:
    return [LogitBias(), Banned()]

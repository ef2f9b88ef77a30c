"""The end of a draw: what a sampler may not draw is refused, and the next step's buffers are filled."""

from __future__ import annotations

import pytest
import torch
from engines import Scripted, finish
from helpers import tokens_of
from rwkv_backends.eager import Eager
from rwkv_samplers.nucleus import Nucleus
from settling import check_settled
from torch import Tensor

from rwkv_runtime.controls import Controls
from rwkv_runtime.engine import Engine
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Model
from rwkv_runtime.state import TensorSpec
from rwkv_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("lag")


def test_every_draw_is_settled_as_it_must() -> None:
    check_settled(Eager())


class Places(Nucleus):
    """Remembers the position at which each token was drawn."""

    name = "places"

    def slots(self, vocab_size: int) -> dict[str, TensorSpec]:
        return {"places": TensorSpec((64,), torch.int64)}

    def update(self, tokens: Tensor, logits: Tensor, controls: Controls) -> None:
        here = torch.arange(64) == controls.position
        controls.slots["places"].copy_(torch.where(here, tokens[:, None], controls.slots["places"]))


def test_a_draw_is_remembered_at_its_own_position(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, Eager(), Places(), tokenizer)
    prompt = tokens_of(5)
    text = finish(engine, Request(prompt, max_tokens=20, seed=1))[0]
    places = engine.controls.slots["places"][0].tolist()
    start = text.position - len(text.tokens)
    assert places[start : start + 20] == text.tokens


def test_ids_that_the_vocabulary_does_not_have_are_masked_in_the_engines_logits(
    model: Model, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, Eager(), Nucleus(), tokenizer)
    finish(engine, Request([5], max_tokens=2))
    finite = engine.logits[0].isfinite()
    assert finite.nonzero().flatten().tolist() == [i for i in range(260) if i not in tokenizer.absent(260)]


def test_a_sampler_that_draws_such_an_id_fails_its_row(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, Eager(), Scripted([70, 71, 258]), tokenizer)
    text = finish(engine, Request([5], max_tokens=9))[0]
    assert (text.finish, len(text.tokens) < 3) == ("error", True)

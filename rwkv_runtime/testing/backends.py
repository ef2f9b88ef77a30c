"""A backend against the architecture's own float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rwkv_runtime.backend import Backend, Forward, Outcome
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.state import State
from rwkv_runtime.testing.models import BYTE_VOCABULARY, tiny_checkpoint
from rwkv_runtime.testing.words import describe, reason

ROWS = 2
PIECES = (1, 1, 17, 2, 32, 11)  # one prompt in pieces of many lengths, so that the state is carried across them
TICKS = 4


@dataclass(frozen=True)
class _Trial:
    """A tiny model, a few texts and what the reference says of them."""

    backend: Backend
    model: Model
    tokens: Tensor  # [B, T]
    expected: Tensor  # [B, T, V] float64
    tolerance: float

    def error(self, got: Tensor, expected: Tensor) -> str | None:
        """What is wrong with these logits, if anything."""
        if got.shape != expected.shape or got.dtype != torch.float32:
            return f"gives {describe(got)} where float32 {list(expected.shape)} is expected"
        off = float((got.double().cpu() - expected).abs().max() / expected.abs().max())
        if off <= self.tolerance:
            return None
        return f"is {off:.1e} away from the reference, {self.tolerance:.0e} is allowed"


def check_backend(
    backend: Backend,
    architectures: Iterable[Architecture] | None = None,
    *,
    device: str = "cpu",
    tolerance: float = 1e-4,
    n_layer: int = 2,
    n_embd: int = 64,
    head_size: int = 16,
) -> None:
    """Runs tiny float32 models of each family (default: all that are installed) and compares with its reference.

    `tolerance` is the largest difference of two logits, as a share of the largest logit. Raises AssertionError
    with one line for each mistake: `why_not` that refuses or gives no reason; logits that are off for one token,
    for a prompt in one piece or in several, for every position (`every=True`) or for one of several rows; a
    state that is not updated in place; rows touched that are not in the given view; a decode step after `freeze`
    that gives other logits, or buffers that `freeze` did not leave as found; rows of `new_state` that `settled` does
    not give as they are; a `warm_up` that raises; and a `settle` that differs from `Backend.settle`.
    """
    chosen = list(Plugins.load().architectures if architectures is None else architectures)
    problems = [] if chosen else ["there is no architecture to try it with"]
    for architecture in chosen:
        tensors = tiny_checkpoint(architecture, n_layer=n_layer, n_embd=n_embd, head_size=head_size)
        model = build_model(tensors, [architecture], torch.device(device), torch.float32, "tiny model")
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(BYTE_VOCABULARY, (ROWS, sum(PIECES)), generator=generator)
        expected = torch.stack([architecture.reference(tensors, row) for row in tokens.tolist()])
        trial = _Trial(backend, model, tokens.to(device), expected, tolerance)
        problems += [f"{architecture.name}: {problem}" for problem in _problems(trial)]
    if problems:
        raise AssertionError("\n".join(f"backend {backend.name}: {problem}" for problem in problems))


def _problems(trial: _Trial) -> Iterator[str]:
    for given in (None, trial.model):
        refusal = trial.backend.why_not(given)
        if refusal is not None:
            right = isinstance(refusal, str) and refusal.strip() and "\n" not in refusal
            yield f"cannot be used here: {refusal}" if right else f"why_not gives {refusal!r}, not None or one line"
            return
    try:
        trial.backend.warm_up(trial.model.device, lambda: trial.model)
    except Exception as error:  # whatever a stranger's backend raises is the finding
        yield f"warm_up raises {reason(error)}"
    try:
        forward = trial.backend.forward(trial.model)
    except Exception as error:  # as above
        yield f"forward raises {reason(error)}"
        return
    checks: list[Callable[[_Trial, Forward], Iterator[str]]] = [_whole, _pieces, _view, _frozen, _settled]
    for check in checks:
        try:
            yield from check(trial, forward)
        except Exception as error:  # as above
            yield f"{check.__doc__} raises {reason(error)}"


def _whole(trial: _Trial, forward: Forward) -> Iterator[str]:
    """a prompt in one piece"""
    last = forward(trial.tokens, trial.model.new_state(ROWS))
    every = forward(trial.tokens, trial.model.new_state(ROWS), every=True)
    if problem := trial.error(last, trial.expected[:, -1]):
        yield f"a prompt in one piece: {problem}"
    if problem := trial.error(every, trial.expected):
        yield f"every=True: {problem}"


def _pieces(trial: _Trial, forward: Forward) -> Iterator[str]:
    """a prompt in pieces"""
    state = trial.model.new_state(ROWS)
    held = dict(state.tensors)
    end = 0
    for size in PIECES:
        end += size
        logits = forward(trial.tokens[:, end - size : end], state)
        if any(state.tensors[name] is not t for name, t in held.items()):
            yield "the caller's state gets new tensors; write into the ones it has"
            return
        if problem := trial.error(logits, trial.expected[:, end - 1]):
            hint = "; the caller's state is not updated" if _equal(state, trial.model.new_state(ROWS)) else ""
            yield f"{size} token{'s' * (size > 1)} after {end - size} others: {problem}{hint}"
            return


def _view(trial: _Trial, forward: Forward) -> Iterator[str]:
    """a view of some rows"""
    state = trial.model.new_state(ROWS + 1)
    spare = state.view(ROWS, ROWS + 1)
    before = spare.clone()
    for t in (0, 1):
        logits = forward(trial.tokens[:, t : t + 1], state.view(0, ROWS))
    if problem := trial.error(logits, trial.expected[:, 1]):
        yield f"a state that is a view of some rows: {problem}"
    if not _equal(spare, before):
        yield "it changes rows of the state that are not in the view it is given"


def _frozen(trial: _Trial, forward: Forward) -> Iterator[str]:
    """the frozen decode step"""
    plain, state = trial.model.new_state(ROWS), trial.backend.new_state(trial.model, ROWS)
    tokens, device = trial.tokens[:, :1].clone(), trial.model.device
    logits = torch.zeros(ROWS, BYTE_VOCABULARY, device=device)
    position = torch.zeros(ROWS, 1, dtype=torch.int64, device=device)

    def tick() -> None:
        trial.backend.step(forward, tokens, state, None, logits)
        position.add_(1)

    start = trial.tokens.shape[1] - TICKS
    forward(trial.tokens[:, :start], plain)
    for row in range(ROWS):
        state.copy(plain, row, row)
        taken = state.settled(row)
        if type(taken) is not State or taken.tensors.keys() != plain.tensors.keys():
            yield f"a row taken out of its state is a {type(taken).__name__} of {', '.join(taken.tensors)}"
            return
    buffers = [*state.tensors.values(), logits, position]
    before = [buffer.clone() for buffer in buffers]
    frozen = trial.backend.freeze(tick, buffers)
    if any(not torch.equal(a, b) for a, b in zip(buffers, before, strict=True)):
        yield "freeze does not leave the buffers as it found them"
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    for t in range(start, start + TICKS):
        tokens.copy_(trial.tokens[:, t : t + 1])
        apart = torch.cat([forward(tokens[row : row + 1], state.settled(row)) for row in range(ROWS)])
        if problem := trial.error(apart, trial.expected[:, t]):
            yield f"a row taken out of its state after {t - start} decode steps: {problem}"
            return
        frozen()
        if problem := trial.error(logits, trial.expected[:, t]):
            yield f"the frozen decode step, token {t - start + 1}: {problem}"
            return
    if position.tolist() != [[TICKS]] * ROWS:
        yield f"the frozen decode step ran {position.flatten().tolist()} times, not {TICKS}"


def _settled(trial: _Trial, forward: Forward) -> Iterator[str]:
    """the end of a draw"""
    device = trial.model.device
    tokens = torch.tensor([3, BYTE_VOCABULARY, 5, 7, -1, 9], device=device)
    logits = torch.zeros(len(tokens), BYTE_VOCABULARY, device=device)
    logits[2, 5], logits[3, 8], logits[5, 1] = -torch.inf, torch.nan, torch.inf
    for refused in (False, True):
        outcomes = [Outcome(*(torch.full(shape, 4, device=device) for shape in _shapes(len(tokens)))) for _ in range(2)]
        given = trial.backend.settle(tokens.clone(), logits.clone(), refused, outcomes[0])
        right = Backend.settle(trial.backend, tokens, logits, refused, outcomes[1])
        for name, ours, theirs in (
            ("gives", given, right),
            *((f"leaves in {field.name}", *(getattr(o, field.name) for o in outcomes)) for field in fields(Outcome)),
        ):
            if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                yield f"settle {name} {ours.flatten().tolist()}, not {theirs.flatten().tolist()}"


def _shapes(rows: int) -> list[tuple[int, ...]]:
    """Of the buffers of an `Outcome`."""
    return [(rows,), (rows, 1), (rows, 1), (rows, 1)]


def _equal(a: State, b: State) -> bool:
    return all(torch.equal(t, b[name]) for name, t in a.tensors.items())

"""The usual mistakes of samplers, found and named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_runtime.controls import Controls
from rwkv_runtime.errors import OptionError
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.sampler import Sampler, Where, check_params
from rwkv_runtime.testing.cases import BAD, Case, cases_of
from rwkv_runtime.testing.words import author_line, describe, reason

STEPS = 3  # tokens drawn for each case, so that what a sampler remembers is used
DRAWS = 4096
SIGMAS = 6.0  # the draws are keyed by fixed seeds, so that a check gives the same answer each time
LENIENCY = 1e-6  # of a probability that depends on how many rows the same sum is vectorised over


class _Played(NamedTuple):
    """What a sampler did with some cases."""

    kept: list[Tensor]  # [B, V] for each step
    drawn: list[Tensor]  # [B] for each step
    problem: str | None


def distribution(sampler: Sampler, logits: Tensor, **params: float | Sequence[float]) -> Tensor:
    """The exact probabilities with which a sampler draws its first token: float64 [B, V].

    logits are [B, V], or [V] for one row; a parameter is one number, or one for each row. They are those of
    `filter`; a row where nothing can be drawn is all zeros. Raises OptionError as the runtime does.
    """
    rows = logits.float() if logits.dim() > 1 else logits.float()[None]  # [B, V]
    controls = Controls.allocate(sampler, len(rows), rows.shape[-1], rows.device)
    for row in range(len(rows)):
        given = {name: value if _is_number(value) else value[row] for name, value in params.items()}  # type: ignore[index]
        controls.set(row, check_params(sampler, given), seed=row, position=0)
        sampler.prime(torch.empty(0, dtype=torch.int64, device=rows.device), controls.view(row, row + 1))
    return _probabilities(sampler.filter(rows.clone(), controls))


def check_sampler(sampler: Sampler, *, vocab_size: int = 64) -> None:
    """Tries a sampler on hard logits, with every parameter at its default and at its bounds.

    Raises AssertionError with one line for each mistake: a parameter whose default is out of its bounds, or that its
    own `check` refuses; a call that raises; a wrong shape or dtype; NaN, a masked id or nothing at all to draw from;
    logits or controls changed, slots by more than `prime` and `update`, or not in place; a row that depends on its
    batch-mates; draws that do not repeat, or that do not follow `filter`; with `refuses`, a draw from a row with NaN or
    +inf or nothing in it; and, where `runs` is "graph", a call that waits for the host.
    """
    problems = list(_parameter_problems(sampler))
    cases = list(cases_of(sampler, vocab_size)) if not problems else []
    alone: list[_Played] = []
    if not problems:
        alone, problems = _play_alone(sampler, cases)
    if not problems:
        checks: list[Callable[[], str | None]] = [
            lambda: _repeat_problem(sampler, cases) or _row_problem(sampler, cases, alone),
            lambda: _frequency_problem(sampler, "seed") or _frequency_problem(sampler, "position"),
            lambda: _host_problem(sampler, vocab_size) if sampler.runs == "graph" else None,
        ]
        problems = [problem for check in checks if (problem := _said(check))]
    if problems:
        raise AssertionError("\n".join(f"sampler {sampler.name}: {problem}" for problem in problems))


def _said(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # whatever a stranger's sampler raises is the finding
        return f"raises {reason(error)}{author_line(error)}"


def _parameter_problems(sampler: Sampler) -> Iterator[str]:
    taken = {*inspect.signature(Runtime.generate).parameters, *inspect.signature(Runtime.generate_batch).parameters}
    if sampler.runs not in get_args(Where):
        yield f"runs is {sampler.runs!r}, not one of {', '.join(get_args(Where))}"
    for name, param in sampler.params.items():
        if not name.isidentifier() or name in taken:
            yield f"{name!r} cannot be a parameter: it is no Python name, or an argument of generate() already"
        for what, value in (("default", param.default), ("neutral value", param.off)):
            try:
                if value is not None:
                    param.check(name, value)
            except OptionError as error:
                yield f"the {what} of {name} is out of its own bounds: {error}"
    try:
        sampler.check({name: param.default for name, param in sampler.params.items()})
    except Exception as error:  # whatever a stranger's sampler raises is the finding
        yield f"its check refuses the defaults: {reason(error)}{author_line(error)}"


def _controls(sampler: Sampler, cases: Sequence[Case], vocab_size: int) -> Controls:
    controls = Controls.allocate(sampler, len(cases), vocab_size, torch.device("cpu"))
    for row, case in enumerate(cases):
        controls.set(row, case.values, case.seed, position=7)
        sampler.prime(torch.arange(7) % min(vocab_size, 5), controls.view(row, row + 1))
    return controls


def _play(sampler: Sampler, cases: Sequence[Case]) -> _Played:
    """Filters, draws and remembers, some steps long, as the engine does; ends early where the rules are broken."""
    logits = torch.stack([case.logits for case in cases])  # [B, V]
    controls = _controls(sampler, cases, logits.shape[-1])
    watched = (*controls.values.values(), controls.seed, controls.position)
    played, slots = _Played([], [], None), dict(controls.slots)
    for _ in range(STEPS):
        sampler.prepare(controls)
        given, twin, before = logits.clone(), logits.clone(), [t.clone() for t in watched]
        memory = [slot.clone() for slot in slots.values()]
        kept = sampler.filter(given, controls).clone()
        if kept.shape != logits.shape or kept.dtype != torch.float32:
            return played._replace(problem=f"filter gives {describe(kept)}, not float32 {list(logits.shape)}")
        drawn = sampler.sample(twin, controls).clone()
        if drawn.shape != (len(cases),) or drawn.dtype != torch.int64:
            return played._replace(problem=f"sample gives {describe(drawn)}, not int64 {[len(cases)]}")
        if not (_same(given, logits) and _same(twin, logits)):
            return played._replace(problem="changes the logits it is given; write the result to a new tensor")
        if not all(map(_same, before, watched)):
            return played._replace(problem="changes the parameters, the seed or the position in its controls")
        if not all(map(_same, memory, slots.values())):
            return played._replace(problem="changes its slots before a token is drawn; only prime and update may")
        played.kept.append(kept)
        played.drawn.append(drawn)
        sampler.update(torch.where(logits.amax(dim=-1).isfinite(), drawn, -1), logits, controls)
        if any(controls.slots[name] is not slot for name, slot in slots.items()):
            return played._replace(problem="puts another tensor in the place of a slot; write into it")
        controls.position.add_(1)
    return played


def _play_alone(sampler: Sampler, cases: Sequence[Case]) -> tuple[list[_Played], list[str]]:
    """Each case by itself, and what was wrong: each mistake once, with the first case that shows it."""
    results, found = [], dict[str, Case]()
    for case in cases:
        try:
            played = _play(sampler, [case])
        except Exception as error:  # whatever a stranger's sampler raises is the finding
            found.setdefault(f"raises {reason(error)}{author_line(error)}", case)
            continue
        results.append(played)
        problems = [played.problem]
        if case.kind not in BAD:
            problems += map(partial(_choice_problem, case), played.kept, played.drawn)
        elif sampler.refuses and any(int(drawn) >= 0 for drawn in played.drawn):
            problems.append("says that it refuses rows that cannot be drawn from, and draws from one")
        if problem := next(filter(None, problems), None):
            found.setdefault(problem, case)
    return results, [f"{problem} ({case})" for problem, case in found.items()]


def _choice_problem(case: Case, kept: Tensor, drawn: Tensor) -> str | None:
    """What is wrong with the choice in a row that can be drawn from; kept [1, V], drawn [1]."""
    if bool(kept.isnan().any()) or bool((kept == torch.inf).any()):
        return "filter gives NaN or +inf, from which nothing can be drawn"
    if bool((kept == -torch.inf).all()):
        return "filter keeps no token at all; the likeliest one should always stay"
    masked = case.logits == -torch.inf
    if bool((kept[0] > -torch.inf)[masked].any()):
        likely = bool((kept >= 0).all()) and abs(float(kept.sum()) - 1) < 1e-3
        hint = "; it gives probabilities where logits are expected" if likely else ""
        return f"filter brings back a masked id: one whose logit was -inf{hint}"
    if not 0 <= int(drawn) < len(case.logits):
        return f"sample draws {int(drawn)}, which is no token id"
    return "sample draws a token that filter does not keep" if kept[0, int(drawn)] == -torch.inf else None


def _repeat_problem(sampler: Sampler, cases: Sequence[Case]) -> str | None:
    first, second = _play(sampler, cases), _play(sampler, cases)
    if all(map(_same, first.kept + first.drawn, second.kept + second.drawn)):
        return None
    return "does not repeat with the same seed; draw with controls.draw, or from a noise keyed by seed and position"


def _row_problem(sampler: Sampler, cases: Sequence[Case], alone: Sequence[_Played]) -> str | None:
    """Compares each row in a batch, in both orders, with itself alone."""
    for order in (range(len(cases)), range(len(cases) - 1, -1, -1)):
        batch = _play(sampler, [cases[i] for i in order])
        for row, i in enumerate(order):
            if cases[i].kind in BAD:
                continue
            for step in range(STEPS):
                ours, theirs = (_probabilities(played.kept[step]) for played in (alone[i], batch))
                same = torch.allclose(ours[0], theirs[row], rtol=0, atol=LENIENCY)
                if not same or int(alone[i].drawn[step]) != int(batch.drawn[step][row]):
                    return f"a row's result depends on its batch-mates or on its place among them ({cases[i]})"
    return None


def _frequency_problem(sampler: Sampler, varied: str) -> str | None:
    """Draws often from one row, and counts."""
    logits = torch.linspace(0, -3, 12).expand(DRAWS, -1).contiguous()  # [N, V]
    controls = Controls.allocate(sampler, DRAWS, 12, logits.device)
    sampler.prime(torch.arange(7) % 5, controls.view(0, 1))
    for note in controls.notes:  # all begin as the first one has
        note.update(controls.notes[0])
    for slot in controls.slots.values():
        slot[1:] = slot[0]
    sampler.prepare(controls)
    numbers = torch.arange(DRAWS)[:, None]
    (controls.seed if varied == "seed" else controls.position).copy_(numbers)
    p = _probabilities(sampler.filter(logits.clone(), controls))
    counts = torch.bincount(sampler.sample(logits.clone(), controls), minlength=12).double()
    sigma = (p * (1 - p)).sum(dim=0).sqrt()
    off = (counts - p.sum(dim=0)).abs() > SIGMAS * sigma + 1
    if not bool(off.any()):
        return None
    token = int(off.int().argmax())
    return (
        f"over {DRAWS} {varied}s it draws token {token} {int(counts[token])} times where filter's probabilities "
        f"say {float(p[:, token].sum()):.0f}"
    )


class _NoMasks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what waits for the host on a GPU and yet runs on tensors without data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func.overloadpacket in (torch.ops.aten.index_put_, torch.ops.aten.index_put)
        if indexed and args[2].numel() > 1 and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise RuntimeError("many values are assigned through a mask; use torch.where")
        return func(*args, **(kwargs or {}))


def _host_problem(sampler: Sampler, vocab_size: int) -> str | None:
    """Runs it on tensors that have no data: whoever asks for a value is found out."""
    controls = Controls.allocate(sampler, 2, vocab_size, torch.device("meta"))
    logits = torch.zeros(2, vocab_size, device="meta")
    try:
        with _NoMasks():  # type: ignore[no-untyped-call]
            sampler.filter(logits, controls)
            sampler.update(sampler.sample(logits, controls), logits, controls)
    except Exception as error:  # torch raises several types here
        if "not on the expected device" in str(error):
            return f"mixes devices; make tensors with device=logits.device{author_line(error)}"
        return f'waits for the host, which a graph cannot do; avoid it, or say runs = "device"{author_line(error)}'
    return None


def _probabilities(kept: Tensor) -> Tensor:
    """Softmax in float64, [B, V]; zeros in a row where nothing can be drawn."""
    drawable = kept.amax(dim=-1, keepdim=True).isfinite()
    return torch.where(drawable, torch.softmax(kept.double(), dim=-1), 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(1.25e9), b.nan_to_num(1.25e9))

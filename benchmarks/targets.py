"""What was to be reached: each target with the figure that shows it, read from the results of one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.results import Record, setting

PACKAGE = "rwkv package"
OTHERS = (PACKAGE, "tuned compile", "per-op compile", "fla wkv", "llama.cpp")
"""Contestants that are not this runtime's own backends."""
WHOLE = ("compile", "tuned compile")
"""Those that are a whole step through torch.compile with a captured graph."""
Find = Callable[[Sequence[Record]], "Reached | None"]


class Reached(NamedTuple):
    value: float
    who: str


class Target(NamedTuple):
    """`find` gives the figure where it was measured; it is to be at least `least` or at most `most`."""

    what: str
    find: Find
    least: float | None = None
    most: float | None = None
    form: str = "{:.0%}"

    def aim(self) -> str:
        bound = f"at least {self.form}" if self.least is not None else f"at most {self.form}"
        return bound.format(self.least if self.least is not None else self.most)

    def met(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


def select(results: Sequence[Record], case: str, **wanted: Any) -> list[Record]:
    """The results of a case with these figures; whatever came from a smoke run counts for nothing."""
    members = [r for r in results if r["case"] == case and not r["smoke"]]
    return [r for r in members if all(r.get(name) == value for name, value in wanted.items())]


def ours(members: Sequence[Record]) -> list[Record]:
    return [r for r in members if r["contestant"] not in OTHERS]


def best(case: str, figure: str, of_fastest: bool = False, **wanted: Any) -> Find:
    """The best of this runtime's backends in one figure, or what that has whose steps are the shortest."""

    def find(results: Sequence[Record]) -> Reached | None:
        found = [r for r in ours(select(results, case, **wanted)) if r.get(figure) is not None]
        if not found:
            return None
        chosen = max(found, key=lambda r: -float(r["ms_p50"]) if of_fastest else float(r[figure]))
        return Reached(chosen[figure], chosen["contestant"])

    return find


def ahead(of: Sequence[str], case: str, **wanted: Any) -> Find:
    """How many times as fast as the best of some contestants the best other backend of this runtime is."""

    def find(results: Sequence[Record]) -> Reached | None:
        members = select(results, case, **wanted)
        rivals = [r for r in members if r["contestant"] in of]
        rival = min(rivals, key=lambda r: float(r["ms_p50"]), default=None)
        found = [r for r in ours(members) if r["contestant"] not in of]
        if rival is None or not found:
            return None
        chosen = min(found, key=lambda r: float(r["ms_p50"]))
        return Reached(rival["ms_p50"] / chosen["ms_p50"], chosen["contestant"])

    return find


def gain(batch: int, **wanted: Any) -> Find:
    """Tokens a second of a batch, as a multiple of those of one row: the best backend each."""

    def find(results: Sequence[Record]) -> Reached | None:
        one = best("decode", "tokens_per_second", batch=1, **wanted)(results)
        many = best("decode", "tokens_per_second", batch=batch, **wanted)(results)
        return Reached(many.value / one.value, many.who) if one and many else None

    return find


def longest_prefill(least: int, **wanted: Any) -> Find:
    """The share of the matrix product rate for prompts of so many tokens or more."""

    def find(results: Sequence[Record]) -> Reached | None:
        found = [r for r in ours(select(results, "prefill", **wanted)) if r["length"] >= least]
        chosen = max(found, key=lambda r: float(r["matmul_share"]), default=None)
        return Reached(chosen["matmul_share"], chosen["contestant"]) if chosen else None

    return find


def beyond_reading(**wanted: Any) -> Find:
    """Seconds of a warm start up to the first token, less those of reading the weights.

    Of the backend whose steps of one row are the shortest: one that prepares nothing starts sooner, and is slow for
    good. Where no steps were measured, the best.
    """

    def find(results: Sequence[Record]) -> Reached | None:
        found = [r for r in ours(select(results, "start", **wanted)) if "warm_reading" in r]
        seconds = {r["contestant"]: r["warm_first_token"] - r["warm_reading"] for r in found}
        steps = ours(select(results, "decode", batch=1, **wanted))
        chosen = min(steps, key=lambda r: float(r["ms_p50"]), default=None)
        who = chosen["contestant"] if chosen else min(seconds, key=lambda name: seconds[name], default=None)
        return Reached(seconds[who], who) if who in seconds else None

    return find


def slowest(case: str, **wanted: Any) -> Find:
    """The worst of all settings, of the backend that is best in each, against the package."""

    def find(results: Sequence[Record]) -> Reached | None:
        fastest: dict[tuple[Any, ...], Record] = {}
        for r in ours(select(results, case, **wanted)):
            key = setting(r)
            if r["ratio_to_package"] and (key not in fastest or r["ratio_to_package"] > ratio(fastest[key])):
                fastest[key] = r
        chosen = min(fastest.values(), key=ratio, default=None)
        return Reached(ratio(chosen), chosen["contestant"]) if chosen else None

    return find


def ratio(r: Record) -> float:
    return float(r["ratio_to_package"])


def gpu_targets() -> Iterator[Target]:
    """Those of a data-centre GPU, RWKV-6 in bfloat16."""
    model: dict[str, Any] = {"architecture": "rwkv6", "dtype": "bfloat16"}
    for size, least in (("1.6b", 0.80), ("3b", 0.88), ("7b", 0.92)):
        find = best("decode", "read_share", size=size, batch=1, **model)
        yield Target(f"decode {size}, one row: share of the read rate", find, least)
    for size in ("1.6b", "3b", "7b"):
        find = best("decode", "read_share", size=size, batch=256, **model)
        yield Target(f"decode {size}, 256 rows: share of the read rate", find, 0.75)
    for size in ("1.6b", "3b", "7b"):
        find = longest_prefill(2048, size=size, **model)
        yield Target(f"prefill {size}, 2,048 tokens or more: share of the matrix product rate", find, 0.65)
    find = best("decode", "ratio_to_package", size="1.6b", batch=1, **model)
    yield Target("decode 1.6b, one row: times the `rwkv` package", find, 6.0, form="{:.1f}x")
    for size, least in (("1.6b", 1.5), ("7b", 1.2)):
        find = ahead(WHOLE, "decode", size=size, batch=1, **model)
        yield Target(f"decode {size}, one row: times the whole step through torch.compile", find, least, form="{:.1f}x")
    find = beyond_reading(size="1.6b", **model)
    yield Target("warm start 1.6b, beyond reading the weights", find, most=2.0, form="{:.1f} s")
    find = best("sampling share", "sampling_share", of_fastest=True, size="1.6b", **model)
    yield Target("sampling, nucleus, 1.6b, one row: share of a step", find, most=0.02)
    yield from engine_targets()


def cpu_targets() -> Iterator[Target]:
    model: dict[str, Any] = {"architecture": "rwkv6", "dtype": "bfloat16"}
    find = best("decode", "read_share", size="1.6b", batch=1, **model)
    yield Target("decode 1.6b bfloat16, one row: share of the read rate", find, 0.85)
    for size, least in (("1.6b", 1.45), ("0.1b", 1.6)):
        find = best("decode", "ratio_to_package", size=size, batch=1, **model)
        yield Target(f"decode {size} bfloat16, one row: times the `rwkv` package", find, least, form="{:.2f}x")
    find = ahead(["llama.cpp"], "decode", size="1.6b", batch=1, **model)
    yield Target("decode 1.6b bfloat16, one row: times llama.cpp", find, 1.0, form="{:.2f}x")
    for size in ("0.1b", "1.6b"):
        yield Target(f"decode {size} bfloat16: 8 rows against one", gain(8, size=size, **model), 5.0, form="{:.1f}x")
    for size in ("0.1b", "1.6b"):
        find = best("prefill", "ratio_to_package", size=size, length=512, prompts=1, **model)
        yield Target(f"prefill {size} bfloat16, 512 tokens: times the `rwkv` package", find, 2.0, form="{:.2f}x")
    for case in ("decode", "prefill"):
        find = slowest(case, architecture="rwkv6", dtype="float32")
        yield Target(f"{case} float32, wherever measured: times the `rwkv` package", find, 1.0, form="{:.2f}x")

    def nucleus(results: Sequence[Record]) -> Reached | None:
        found = select(results, "sampling", contestant="nucleus", batch=1)
        return Reached(found[0]["ms_p50"], "nucleus") if found else None

    yield Target("sampling, nucleus, one row of 65,536 logits", nucleus, most=2.0, form="{:.1f} ms")
    yield from engine_targets()


def engine_targets() -> Iterator[Target]:
    find = best("overhead", "share_outside")  # the largest, so that it holds for every backend
    yield Target("engine, embedded model: share of a token's time beyond forward pass and sampling", find, most=0.10)
    find = best("growth", "growth")
    yield Target("a step after 10,000 tokens of context, of one after 100", find, most=1.05)

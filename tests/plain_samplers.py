"""Every sampler's definition once more, in plain float64 Python, for one row and its first draw: slow and obvious.

Each takes the logits and the parameters and gives the logits to draw from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

INF = math.inf
Row = list[float]


def softmax(z: Sequence[float]) -> Row:
    weights = [math.exp(x - max(z)) for x in z]
    return [weight / sum(weights) for weight in weights]


def ranked(score: Sequence[float]) -> list[int]:
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def keep(z: Sequence[float], kept: set[int]) -> Row:
    return [x if i in kept else -INF for i, x in enumerate(z)]


def shortest(order: Sequence[int], p: Sequence[float], mass: float) -> set[int]:
    """The shortest prefix of the order that holds the mass."""
    kept, held = set[int](), 0.0
    for i in order:
        if held >= mass and kept:
            break
        kept.add(i)
        held += p[i]
    return kept


def temperature(z: Row, temperature: float) -> Row:
    return keep(z, {ranked(z)[0]}) if temperature == 0 else [(x - max(z)) / temperature for x in z]


def top_k(z: Row, top_k: float) -> Row:
    return keep(z, set(ranked(z)[: int(top_k) or None]))


def top_p(z: Row, top_p: float) -> Row:
    return z if top_p == 1 else keep(z, shortest(ranked(z), softmax(z), top_p))


def typical(z: Row, typical_p: float) -> Row:
    p = softmax(z)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    score = [-abs(-math.log(x) - entropy) if x > 0 else -INF for x in p]
    return z if typical_p == 1 else keep(z, shortest(ranked(score), p, typical_p))


def floor(z: Row, least: float) -> Row:
    """Tokens whose probability is at least this, and the best ones always."""
    p = softmax(z)
    return keep(z, {i for i, x in enumerate(p) if x >= least or x == max(p)})


def min_p(z: Row, min_p: float) -> Row:
    return floor(z, min_p * max(softmax(z)))


def epsilon(z: Row, epsilon: float) -> Row:
    return floor(z, epsilon)


def eta(z: Row, eta: float) -> Row:
    entropy = -sum(x * math.log(x) for x in softmax(z) if x > 0)
    return floor(z, min(eta, math.sqrt(eta) * math.exp(-entropy)))


def top_n_sigma(z: Row, top_n_sigma: float) -> Row:
    finite = [x for x in z if x > -INF]
    mean = sum(finite) / len(finite)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in finite) / len(finite))
    return z if top_n_sigma < 0 else keep(z, {i for i, x in enumerate(z) if x >= max(z) - top_n_sigma * sigma})


def xtc(z: Row, xtc_probability: float, xtc_threshold: float) -> Row:
    """For a probability of 0 or 1."""
    p = softmax(z)
    top = [i for i in ranked(z) if p[i] >= xtc_threshold and z[i] > -INF]
    return keep(z, set(range(len(z))) - set(top[:-1])) if xtc_probability else z


def mirostat(z: Row, mirostat_tau: float, mirostat_eta: float) -> Row:
    return floor(z, 2 ** (-2 * mirostat_tau))


def standard(z: Row, temperature: float, top_k: float, top_p: float, min_p: float) -> Row:
    z = PLAIN["temperature"](z, temperature=temperature)
    z = PLAIN["top-p"](PLAIN["top-k"](z, top_k=top_k), top_p=top_p)
    return PLAIN["min-p"](z, min_p=min_p)


def nucleus(z: Row, temperature: float, top_p: float, top_k: float) -> Row:
    """RWKV's demo programs: softmax; drop all but the k likeliest; of the whole distribution, sorted, find the
    probability at which the running sum reaches P; drop what is less likely; cut the tokens at that probability down so
    that exactly P is left (less where k lets in only some of them: none grows); raise to 1/T."""
    order, every = ranked(z), softmax(z)
    if temperature == 0 or top_p == 0:
        return keep(z, {order[0]})
    kept = [0.0] * len(z)
    for i in order[: int(top_k) or None]:
        kept[i] = every[i]
    if top_p < 1:
        running, cutoff = 0.0, every[order[-1]]
        for i in order:
            running += every[i]
            if running >= top_p:
                cutoff = every[i]
                break
        kept = [p if p >= cutoff else 0.0 for p in kept]
        tied = [i for i, p in enumerate(kept) if p == cutoff]
        excess = sum(kept) - top_p
        for i in tied:
            kept[i] = min(cutoff, max(0.0, cutoff - excess / len(tied)))
    return [math.log(p / max(kept)) / temperature if p > 0 else -INF for p in kept]


PLAIN: dict[str, Callable[..., Row]] = {
    "greedy": lambda z: keep(z, {ranked(z)[0]}),
    "temperature": temperature,
    "top-k": top_k,
    "top-p": top_p,
    "typical": typical,
    "min-p": min_p,
    "epsilon": epsilon,
    "eta": eta,
    "top-n-sigma": top_n_sigma,
    "xtc": xtc,
    "mirostat": mirostat,
    "standard": standard,
    "nucleus": nucleus,
}

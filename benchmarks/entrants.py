"""Who may enter a benchmark: every backend that is installed, and the programs it is compared with.

Backends are found through the runtime's own plugins; none is named here. Weights in another form than the
checkpoint's, quantized ones say, are more entrants of the same backends on another model of the line-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.contestants import PER_OP, TUNED, Contestant, Ours, PerOpCompile, TunedCompile
from benchmarks.fla import FLA, FlaWkv
from benchmarks.llama import LLAMA, LlamaCpp, why_no_llama
from benchmarks.package import PACKAGE, Package, why_no_package
from rwkv_runtime import Backend, Plugins
from rwkv_runtime.runtime import why_not

if TYPE_CHECKING:
    from benchmarks.arena import Lineup


class Entrant(NamedTuple):
    """Why it cannot run the line-up's checkpoint here, or None; and the program with the checkpoint loaded."""

    why_not: Callable[[Lineup], str | None]
    load: Callable[[Lineup], Contestant]


def entrants(plugins: Plugins, tune: bool) -> dict[str, Entrant]:
    """By name: the peers, then this runtime's backends, the preferred first; so what takes long to compile is last.

    Without `tune`, ops are traced but not compiled.
    """
    found = {
        PACKAGE: Entrant(
            lambda lineup: why_no_package(lineup.checkpoint.architecture.name),
            lambda lineup: Package(lineup.checkpoint, lineup.device),
        ),
        LLAMA: Entrant(
            lambda lineup: why_no_llama(lineup.checkpoint, lineup.device), lambda lineup: LlamaCpp(lineup.checkpoint)
        ),
        FLA: _of(FlaWkv()),
    }
    backends = sorted(plugins.backends, key=lambda backend: -backend.priority)
    found |= {backend.name: _of(backend) for backend in backends}
    if "compile" in found:  # it knows whether torch.compile works here
        found[TUNED] = _of(TunedCompile(plugins.backends.get("compile")))
        found[PER_OP] = _of(PerOpCompile(plugins.backends.get("compile"), tune))
    return found


def _of(backend: Backend) -> Entrant:
    return Entrant(lambda lineup: why_not(backend, lineup.model), lambda lineup: Ours(backend, lineup.model))

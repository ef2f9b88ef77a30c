"""What the checkpoints of all versions have in common: how their tensors are named, counted and told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rwkv_runtime import CheckpointError, ModelConfig

MARKS = {
    ".ffn.s_emb": "RWKV-7 with DeepEmbed",  # adds to each layer what RWKV-7 does not compute
    ".att.r_k": "RWKV-7",
    ".att.x_r": "RWKV-7",
    ".att.time_maa_": "RWKV-6",
    ".att.time_mix_": "RWKV-5",
}
"""Parts of names that tell a version; the first one found decides."""


class Shapes:
    """Shapes of a file's tensors, axes of length one left out: files differ in where they keep those."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def get(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise CheckpointError(f"tensor {name} is missing")
        if len(self.shapes[name]) != axes or 0 in self.shapes[name]:
            raise CheckpointError(f"tensor {name} is {list(self.shapes[name])}, not of {axes} axes")
        return self.shapes[name]

    def expect(self, name: str, expected: tuple[int, ...]) -> None:
        if name not in self.shapes:
            raise CheckpointError(f"tensor {name} is missing")
        actual = self.shapes[name]
        if [n for n in actual if n != 1] != [n for n in expected if n != 1]:
            raise CheckpointError(f"tensor {name} is {list(actual)}, it should be {list(expected)}")


def count_layers(names: Iterable[str]) -> int:
    """How many blocks there are without a gap, at least one."""
    found = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    layers = 1
    while str(layers) in found:
        layers += 1
    return layers


def why_not(names: Iterable[str], version: str, mark: str) -> str | None:
    """None where tensors of these names are of `version`, told by `mark`; otherwise what they look like."""
    names = list(names)
    for part, looks_like in MARKS.items():
        if found := next((name for name in names if part in name), None):
            if looks_like == "RWKV-5" and not any(".att.ln_x" in name for name in names):
                looks_like = "RWKV-4"
            return None if looks_like == version else f"it looks like {looks_like}: it has {found}"
    return f"it has no blocks.*{mark} tensors"


def expected_state(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The initial WKV states of a state-tuned file: one in every layer, [H, V, K]. Other files have none."""
    if not any(name.endswith(".att.time_state") for name in names):
        return {}
    size = config.head_size
    return {f"blocks.{i}.att.time_state": (config.n_head, size, size) for i in range(config.n_layer)}

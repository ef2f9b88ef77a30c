"""A plugin-based runtime for RWKV language models.

    import rwkv_runtime

    model = rwkv_runtime.load("model.pth")
    for piece in model.generate("Once upon a time"):
        print(piece, end="")

Names are imported when they are first used, so that `import rwkv_runtime` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_runtime.backend import Backend, Forward, Outcome, Tick, chunk_size
    from rwkv_runtime.controls import Controls
    from rwkv_runtime.errors import (
        BackendError,
        CheckpointError,
        OptionError,
        PluginError,
        RwkvError,
        SamplingError,
        StateError,
        VocabularyError,
    )
    from rwkv_runtime.hooks import hookimpl
    from rwkv_runtime.loading import load
    from rwkv_runtime.model import Architecture, Model, ModelConfig, Place
    from rwkv_runtime.plugins import Plugins
    from rwkv_runtime.runtime import Runtime
    from rwkv_runtime.sampler import Chain, Param, Sampler
    from rwkv_runtime.state import State, TensorSpec
    from rwkv_runtime.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOME = {
    "backend": ("Backend", "Forward", "Outcome", "Tick", "chunk_size"),
    "controls": ("Controls",),
    "errors": (
        "BackendError",
        "CheckpointError",
        "OptionError",
        "PluginError",
        "RwkvError",
        "SamplingError",
        "StateError",
        "VocabularyError",
    ),
    "hooks": ("hookimpl",),
    "loading": ("load",),
    "model": ("Architecture", "Model", "ModelConfig", "Place"),
    "plugins": ("Plugins",),
    "runtime": ("Runtime",),
    "sampler": ("Chain", "Param", "Sampler"),
    "state": ("State", "TensorSpec"),
    "tokenizer": ("Tokenizer",),
}

__all__ = [  # noqa: RUF022  (in the order of _HOME, which a test holds)
    "Backend",
    "Forward",
    "Outcome",
    "Tick",
    "chunk_size",
    "Controls",
    "BackendError",
    "CheckpointError",
    "OptionError",
    "PluginError",
    "RwkvError",
    "SamplingError",
    "StateError",
    "VocabularyError",
    "hookimpl",
    "load",
    "Architecture",
    "Model",
    "ModelConfig",
    "Place",
    "Plugins",
    "Runtime",
    "Chain",
    "Param",
    "Sampler",
    "State",
    "TensorSpec",
    "Tokenizer",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"rwkv_runtime.{module}"), name)
    raise AttributeError(f"module 'rwkv_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

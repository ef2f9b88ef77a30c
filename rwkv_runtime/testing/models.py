"""Small random models, made on the spot."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Architecture
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.settings import parse_device, parse_dtype
from rwkv_runtime.tokenizer import Tokenizer

BYTE_VOCABULARY = 257
"""End of text and the 256 single bytes."""


def byte_tokenizer() -> Tokenizer:
    """A vocabulary of the single bytes: byte b has id b + 1, id 0 is end of text."""
    return Tokenizer.from_tokens({byte + 1: bytes([byte]) for byte in range(256)})


def tiny_checkpoint(
    architecture: Architecture, *, n_layer: int = 2, n_embd: int = 64, head_size: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Random float32 tensors of one family for `byte_tokenizer`, under the names its files use."""
    config = architecture.sizes(n_layer, n_embd, BYTE_VOCABULARY, head_size)
    return architecture.random(config, seed)


def tiny_model(
    architecture: str = "rwkv6",
    *,
    backend: str = "eager",
    plugins: Plugins | None = None,
    n_layer: int = 2,
    n_embd: int = 64,
    head_size: int = 16,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    quant: str | None = None,
) -> Runtime:
    """A random model of one family with a byte vocabulary: everything `rwkv_runtime.load` gives, within a second.

    It writes nonsense, but writes it like any other model: `tiny_model().generate("Hi", sampler="greedy")`.
    `plugins` says what it may be asked for (default: all that are installed). Raises OptionError for an
    architecture, a backend, a dtype, a device or a quantization that there is not.
    """
    plugins = plugins or Plugins.load()
    family = plugins.architectures.get(architecture)
    tensors = tiny_checkpoint(family, n_layer=n_layer, n_embd=n_embd, head_size=head_size, seed=seed)
    kind = parse_dtype(dtype) or torch.float32
    model = build_model(tensors, [family], parse_device(device), kind, "tiny model", quant=quant)
    return Runtime(model, byte_tokenizer(), plugins, backend)

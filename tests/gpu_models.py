"""Models on a GPU, and how far what `fused` says of them may be from plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import VOCAB_SIZE, off
from rwkv_backends.fused import interpreted
from torch import Tensor

from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.model import Model
from rwkv_runtime.plugins import Plugins

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = 1e-4
"""How far, by norm, two ways to compute in float32 may be apart."""
needs_gpu = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(interpreted(), reason="Triton's interpreter is on"),
]


def on_gpu(plugins: Plugins, dtype: torch.dtype, name: str = "rwkv6", layers: int = 2) -> Model:
    return pair(plugins, dtype, name, layers)[0]


def pair(plugins: Plugins, dtype: torch.dtype, name: str = "rwkv6", layers: int = 2) -> tuple[Model, Model]:
    """A model, and one of the same weights in float32."""
    architecture = plugins.architectures.get(name)
    tensors = architecture.random(architecture.sizes(layers, 320, VOCAB_SIZE, 64), dtype=dtype)
    ours, exact = (build_model(tensors, [architecture], torch.device("cuda"), d) for d in (dtype, torch.float32))
    return ours, exact


def assert_no_further(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """We are about as near to float32 as plain PyTorch is in the same dtype; how rounding adds up is chance: with other
    weights plain PyTorch was five times as far off as we were."""
    assert off(ours, exact) <= max(EXACT, 4 * off(plain, exact))


def in_16_bits(model: Model) -> Model:
    return replace(model, state_dtype=torch.float16)

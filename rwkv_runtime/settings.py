"""What the words mean that a model is loaded with: devices, types of numbers, quantizations."""

from __future__ import annotations

import torch

from rwkv_runtime.errors import OptionError, there_are
from rwkv_runtime.plugins import Plugins

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""bfloat16 is not one: with 8 bits a sum of many small steps stands still."""


def parse_device(name: str | None) -> torch.device:
    """None: CUDA where there is one. Raises OptionError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"there is no device {name!r}; there are cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r} is not supported; there are cpu, cuda and cuda:N")
    first = device.index in (None, 0) and torch.cuda.is_available()  # which is told sooner than how many there are
    if device.type == "cuda" and not first and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(f"device {name!r} is not here: torch sees {count or 'no'} CUDA device{'s' * (count != 1)}")
    return device


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Raises OptionError for a name that is not one of DTYPES."""
    if name is None:
        return None
    full = SHORT.get(name, name)
    if full not in DTYPES:
        raise OptionError(f"there is no dtype {name!r}; {there_are(DTYPES)}")
    return DTYPES[full]


def parse_state_dtype(name: str | None) -> torch.dtype:
    """Raises OptionError for a name that is not one of STATE_DTYPES."""
    if name is None:
        return torch.float32
    full = SHORT.get(name, name)
    if full not in STATE_DTYPES:
        raise OptionError(f"there is no state dtype {name!r}; {there_are(STATE_DTYPES)}")
    return STATE_DTYPES[full]


def check_quant(name: str | None, plugins: Plugins) -> None:
    """Raises OptionError for a quantization that no architecture has; a file's own may still lack it."""
    known = {quant: None for architecture in plugins.architectures for quant in architecture.quantizations}
    if name is not None and name not in known:
        raise OptionError(f"there is no quantization {name!r}; {there_are(known)}")

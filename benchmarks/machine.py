"""What a figure depends on besides the code: the machine, the versions and the settings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("rwkv-runtime", "rwkv", "torch", "triton", "numpy", "pyrwkv-tokenizer", "fla-core", "llama-cpp-python")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


def describe(device: torch.device) -> dict[str, Any]:
    """Plain values for the JSON file."""
    info: dict[str, Any] = {
        "cpu_model": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flag in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_mhz": _cpuinfo("cpu MHz"),
        "load_average": os.getloadavg()[0],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["gpu"] = properties.name
        info["gpu_memory_gb"] = round(properties.total_memory / 1e9)
        info["cuda"] = torch.version.cuda
        info["clocks"] = clocks()
    return info


def clocks() -> dict[str, str]:
    """Clocks, limits and driver of the first GPU as nvidia-smi says now; {} where there is none. Sets nothing."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return dict(zip(names, (value.strip() for value in answer.split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    """The first value of a key in Linux's own list; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""

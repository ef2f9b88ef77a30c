"""`python -m benchmarks.start CHECKPOINT PROGRAM DTYPE DEVICE`: a fresh process up to its first token, as JSON.

Imports come inside, for they are part of what is timed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PROMPT = list(range(100, 132))
TORCH_ALONE = "import time; begin = time.perf_counter(); import torch; print(time.perf_counter() - begin)"
"""What every program here waits for, for a fresh process with nothing else to do."""


class Start(NamedTuple):
    """Seconds, from one step to the next; first_token is from the start to the first token. Peak memory in GB.

    `imports` are of torch, and of what begins before it: a vocabulary is read meanwhile.
    `reading` is measured apart, afterwards: the weights once more from the system's file cache to the device.
    """

    imports: float
    load: float
    prepare: float
    first_token: float
    peak_gb: float
    reading: float


def environment(cache: Path) -> dict[str, str]:
    """That of this process, with the caches of compilers, and whatever a backend caches, in a folder of their own.

    So is Python's bytecode of libraries that were installed without it: to compile torch's takes longer than to import
    it, and there may be no place beside it to keep that.
    """
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "other"}
    torch = find_spec("torch")
    if torch and torch.cached and not Path(torch.cached).exists():
        folders["PYTHONPYCACHEPREFIX"] = "bytecode"
    own = {name: str(cache / folder) for name, folder in folders.items()}
    return {**os.environ, **own, "PYTHONDONTWRITEBYTECODE": ""}


def read(path: Path, device: str) -> float:
    """Seconds to bring the weights to the device as `load` does, doing nothing else; a CPU maps them."""
    import torch

    from rwkv_runtime.ahead import Ahead
    from rwkv_runtime.checkpoint import open_tensors
    from rwkv_runtime.mapped import Mapped

    tensors = Mapped(open_tensors(path), path)
    begin = time.perf_counter()
    with Ahead(tensors, torch.device(device)) as ahead:
        for name, tensor in tensors.items():
            ahead.take(name, tensor).to(device)
    return time.perf_counter() - begin


def start_ours(path: Path, backend: str, dtype: str, device: str) -> list[float]:
    """Readings of the clock: after the imports, the load, the preparation and the first token."""
    import rwkv_runtime
    from rwkv_runtime import beginning, collector

    with collector.lasting():  # as rwkv-run does
        beginning.begin(path, None, device)
        rwkv_runtime.load  # noqa: B018  (imports torch)
        times = [time.perf_counter()]
        model = rwkv_runtime.load(path, backend=backend, dtype=dtype, device=device)
        times.append(time.perf_counter())
        engine = model.engine("nucleus")
        times.append(time.perf_counter())
    generation = engine.submit(model.request(PROMPT, max_tokens=1, seed=1))
    for _ in engine.stream(generation):
        pass
    if model.backend.name != backend:
        raise SystemExit(f"{backend} gave way to {model.backend.name}")
    return [*times, time.perf_counter()]


def start_package(path: Path, dtype: str, device: str) -> list[float]:
    """With the settings that its variables say; see `package`."""
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    times = [time.perf_counter()]
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    model = RWKV(str(path.with_suffix("")), f"{device} {short}")
    times.append(time.perf_counter())
    pipeline = PIPELINE(model, "rwkv_vocab_v20230424")
    times.append(time.perf_counter())
    logits, _ = model.forward(PROMPT, None)
    pipeline.decode([pipeline.sample_logits(logits, top_p=0.8)])
    return [*times, time.perf_counter()]


def main(path: str, program: str, dtype: str, device: str) -> None:
    begin = time.perf_counter()
    if program == "rwkv package":
        times = start_package(Path(path), dtype, device)
    else:
        times = start_ours(Path(path), program, dtype, device)
    steps = [after - before for before, after in zip([begin, *times], times, strict=False)]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(Start(*steps[:3], times[-1] - begin, peak, read(Path(path), device))._asdict()))


if __name__ == "__main__":
    main(*sys.argv[1:])

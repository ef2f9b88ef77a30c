"""Logits of the `rwkv` package, in a process of its own: it sets flags of torch when it is imported.

    python rwkv_package.py MODEL.pth TOKENS.json STRATEGY LOGITS.pt

Writes logits after every token as read at once, [T, V], and after the first ten as read one by one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def package_logits(
    tensors: Mapping[str, Tensor], tokens: Sequence[int], strategy: str, folder: Path, **switches: str
) -> tuple[Tensor, Tensor]:
    """What the package makes of a checkpoint: (at once, one by one). Switches are its RWKV_... variables."""
    import torch

    torch.save(dict(tensors), folder / "model.pth")
    (folder / "tokens.json").write_text(json.dumps(tokens))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RWKV_")}
    environ |= {"RWKV_CUDA_ON": "0"} | switches
    command = [sys.executable, __file__, folder / "model.pth", folder / "tokens.json", strategy, folder / "logits.pt"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    at_once, singly = torch.load(folder / "logits.pt")
    return at_once, singly


def main(path: str, tokens_path: str, strategy: str, out: str) -> None:
    import torch
    from rwkv.model import RWKV

    model = RWKV(path.removesuffix(".pth"), strategy)
    tokens = json.loads(Path(tokens_path).read_text())
    at_once, _ = model.forward(tokens, None, full_output=True)
    state, singly = None, []
    for token in tokens[:10]:
        logits, state = model.forward([token], state)
        singly.append(logits.float().clone())
    torch.save((at_once.float(), torch.stack(singly)), out)


if __name__ == "__main__":
    main(*sys.argv[1:])

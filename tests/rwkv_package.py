"""Logits of the `rwkv` package, in a process of its own: it sets flags of torch when it is imported.

    python rwkv_package.py MODEL.pth TOKENS.json STRATEGY LOGITS.pt

Writes logits after every token as read at once, [T, V], and after the first ten as read one by one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


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

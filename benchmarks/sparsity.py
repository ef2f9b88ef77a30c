"""`python -m benchmarks.sparsity`: of the value matrix's inputs, how many are zero, by layer.

Of the embedded model, or another trained RWKV-6, over text it did not learn from. A row of the value matrix whose
input is zero need not be read, which is what backends gain from; random weights, of whose inputs half are zero, say
nothing of that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rwkv_layers.linear import times
from rwkv_layers.parts import shift
from rwkv_layers.rwkv6 import ChannelMixing
from torch import Tensor

from rwkv_runtime import Model, Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.vocabulary import find_vocabulary, load_vocabulary

HELD_OUT = Path(__file__).with_name("heldout.txt")


@torch.inference_mode()
def zero_inputs(model: Model, tokens: Sequence[int]) -> list[float]:
    """The share of zeros among what relu^2 leaves, of each layer, while an RWKV-6 reads tokens."""
    shares: list[float] = []
    usual = model.architecture.ops["channel_mixing"]

    def counting(x: Tensor, x_prev: Tensor, w: ChannelMixing) -> Tensor:
        mixed = torch.addcmul(x, shift(x, x_prev), w.maa_k)
        key = times(w.key, mixed.view(-1, x.shape[-1]).t())  # [F, T]
        shares.append(float((key <= 0).float().mean()))
        result: Tensor = usual(x, x_prev, w)
        return result

    ops = {**model.architecture.ops, "channel_mixing": counting}
    model.architecture.forward(ops, model.weights, torch.tensor([tokens]), model.new_state())
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__)
    parser.add_argument("--model", type=Path, help="a trained RWKV-6 [the embedded one]")
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, from its beginning")
    options = parser.parse_args(argv)
    path = options.model or embedded_model()
    model = build_model(open_tensors(path), Plugins.load().architectures, torch.device("cpu"), torch.float32)
    V = model.config.vocab_size
    tokenizer = load_vocabulary(find_vocabulary(path, None, V), V)
    shares = zero_inputs(model, tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.tokens])
    for layer, share in enumerate(shares):
        print(f"layer {layer:2d}: {share:.1%}")
    print(f"all: {sum(shares) / len(shares):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

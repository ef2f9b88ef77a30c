"""Bits per byte of an exported checkpoint on the whole held-out text of each source.

Usage: ``python -m training.evaluate model.safetensors DATA_FOLDER report.json``.  With ``--split train --documents N``
on N documents of each source's training text: how much better that is says how much was learnt by heart.

Every document is read from a zero state after id 0, its context carried to its end; the end of text is
predicted too, so its bits count, while only the bytes of the text itself do.  Arithmetic in fp32, weights as
exported (bf16).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.arrays import load_tokens
from training.data import IGNORED, source_names, token_bytes
from training.export import load_model
from training.model import StoryModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # uncompiled, the WKV takes 16 KiB a token


def read_documents(path: Path) -> list[Tensor]:
    """Documents of a token array, each with the id 0 that precedes it and the one that ends it."""
    tokens = torch.from_numpy(load_tokens(path).astype("int64"))
    starts = (tokens == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(tokens)]
    zero = torch.zeros(1, dtype=torch.long)
    return [torch.cat([tokens[start:end], zero]) for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def document_nats(model: StoryModel, documents: list[Tensor]) -> float:
    """Summed cross entropy of documents, in batches of similar length."""
    device = model.emb.weight.device
    total = 0.0
    remaining = sorted(documents, key=len)
    while remaining:
        rows = max(1, BATCH_TOKENS[device.type] // len(remaining[-1]))
        batch, remaining = remaining[-rows:], remaining[:-rows]
        padded = pad_sequence(batch, batch_first=True, padding_value=IGNORED).to(device)  # [B, T + 1]
        losses = model.losses(padded[:, :-1].clamp(min=0), padded[:, 1:])
        total += float(losses.double().sum())
    return total


def bits_per_byte(
    model: StoryModel, data_folder: Path, split: str = "heldout", most: int | None = None
) -> dict[str, dict[str, float]]:
    """For each source: bits per byte, nats per token, documents, tokens, bytes.

    Of more than ``most`` documents, so many at equal distances.
    """
    spelled = token_bytes(data_folder / "vocab.txt", model.config.vocab_size)
    report: dict[str, dict[str, float]] = {}
    for name in source_names(data_folder):
        documents = read_documents(data_folder / f"{name}.{split}.npy.xz")
        if most is not None:
            documents = documents[:: max(1, len(documents) // most)][:most]
        nats = document_nats(model, documents)
        count = sum(int(spelled[document].sum()) for document in documents)
        tokens = sum(len(document) - 1 for document in documents)
        report[name] = {
            "bits_per_byte": nats / math.log(2) / count,
            "nats_per_token": nats / tokens,
            "documents": len(documents),
            "tokens": tokens,
            "bytes": count,
        }
        print(f"{name:22s} {report[name]['bits_per_byte']:.4f} bits per byte", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte on the held-out text.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--split", choices=["heldout", "train"], default="heldout")
    parser.add_argument("--documents", type=int, help="at most so many of each source")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    model = load_model(arguments.model).to(arguments.device)
    report = bits_per_byte(model, arguments.data, arguments.split, arguments.documents)
    arguments.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

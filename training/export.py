"""Write the trained weights as a bf16 ``.safetensors`` checkpoint with BlinkDL's names.

Usage: ``python -m training.export RUN_FOLDER/last.pt model.safetensors``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import ModelConfig, StoryModel

METADATA = {
    "format": "pt",
    "architecture": "RWKV-6 (x060)",
    "license": "Apache-2.0",
    "sources": (
        "AI-STORIES-ERC/GPT_stories (Rettberg & Wigers 2025, doi 10.18710/VM2K4O; CC0); "
        "roneneldan/TinyStories, pieces (CDLA-Sharing-1.0); "
        "African Storybook and Pratham StoryWeaver (CC-BY); "
        "FairytaleQA's fairy tales from Project Gutenberg (public domain); "
        "ChiLit, birmingham-ccr/corpora (public domain)"
    ),
    "note": (
        "Most of the training text was itself written by language models, some of it by larger ones that were trained "
        "on these sources."
    ),
}


def export(state: Mapping[str, Tensor], path: Path) -> None:
    """Round a state dict to bf16 and write it."""
    partial = path.with_name(f"{path.name}.partial")  # whole or not at all
    save_file({name: tensor.to(torch.bfloat16).cpu() for name, tensor in state.items()}, partial, METADATA)
    partial.replace(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> StoryModel:
    """A model in evaluation mode from an exported checkpoint; its sizes come from the shapes."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    vocab_size, width = tensors["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    head_size = tensors["blocks.0.att.time_faaaa"].shape[1]
    config = ModelConfig(vocab_size, width, layers, head_size, dropout=0.0)
    model = StoryModel(config, dtype)
    model.load_state_dict(tensors)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training checkpoint as bf16 safetensors.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    content = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    export(content["model"], arguments.output)


if __name__ == "__main__":
    main()

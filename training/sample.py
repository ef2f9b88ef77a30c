"""Sample stories from an exported checkpoint, many at once, by the recurrence in fp32.

Usage: ``python -m training.sample model.safetensors vocab.txt stories.txt --count 200``.
The runtime decodes the same checkpoint by code of its own; this one exists so that a training machine needs
nothing else.  Stories are written as they come, unselected, with a line ``<|endoftext|>`` after each; their token
ids go into a ``.ids.json`` beside them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from training.export import load_model
from training.model import MIX_RANK, Block, ChannelMix, StoryModel, TimeMix, linear

if TYPE_CHECKING:
    from rwkv_runtime.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"


@dataclass
class LayerState:
    """What a layer remembers of a text: the last input of both mixings and the WKV state."""

    time_x: Tensor  # [B, C]
    kv: Tensor  # [B, H, K, V]
    channel_x: Tensor  # [B, C]

    @classmethod
    def zero(cls, block: Block, batch: int) -> LayerState:
        weight = block.ln1.weight
        heads, size = block.att.time_faaaa.shape
        zero = weight.new_zeros(batch, weight.numel())
        return cls(zero, weight.new_zeros(batch, heads, size, size), zero)


def time_mix_step(att: TimeMix, x: Tensor, state: LayerState) -> Tensor:
    """Time mixing of one token, [B, C] -> [B, C]; updates the state."""
    heads, size = att.time_faaaa.shape
    delta = state.time_x - x
    state.time_x = x
    low = torch.tanh((x + delta * att.time_maa_x[0]) @ att.time_maa_w1).view(-1, 5, MIX_RANK)
    mixes = torch.einsum("bfi,fic->fbc", low, att.time_maa_w2)  # [5, B, C]
    bases = torch.cat([att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g])
    xw, xk, xv, xr, xg = x + delta * (bases + mixes)
    r, k, v = (
        linear(value, module).view(-1, heads, size)
        for value, module in ((xr, att.receptance), (xk, att.key), (xv, att.value))
    )
    raw = att.time_decay[0] + torch.tanh(xw @ att.time_decay_w1) @ att.time_decay_w2
    decay = torch.exp(-raw.exp()).view(-1, heads, size)
    pair = k[..., :, None] * v[..., None, :]  # [B, H, K, V]
    out = (r[..., None] * (state.kv + att.time_faaaa[..., None] * pair)).sum(-2)
    state.kv = decay[..., None] * state.kv + pair
    normed = F.layer_norm(out, (size,), eps=att.ln_x.eps).view(x.shape) * att.ln_x.weight + att.ln_x.bias
    return linear(normed * F.silu(linear(xg, att.gate)), att.output)


def channel_mix_step(ffn: ChannelMix, x: Tensor, state: LayerState) -> Tensor:
    """Channel mixing of one token, [B, C] -> [B, C]; updates the state."""
    delta = state.channel_x - x
    state.channel_x = x
    key = F.relu(linear(x + delta * ffn.time_maa_k[0], ffn.key)).square()
    return torch.sigmoid(linear(x + delta * ffn.time_maa_r[0], ffn.receptance)) * linear(key, ffn.value)


def model_step(model: StoryModel, tokens: Tensor, states: list[LayerState]) -> Tensor:
    """One token of each text, [B] -> logits [B, V]; updates the states."""
    x: Tensor = model.layer(0).ln0(model.emb(tokens))
    for index, state in enumerate(states):
        block = model.layer(index)
        x = x + time_mix_step(block.att, block.ln1(x), state)
        x = x + channel_mix_step(block.ffn, block.ln2(x), state)
    return linear(model.ln_out(x), model.head)


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row, [B, V] -> [B]: temperature, then the nucleus of mass ``top_p``."""
    probabilities = (logits / temperature).softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # mass before a token: the first one always stays
    choice = torch.multinomial(ordered.masked_fill(outside, 0.0), 1, generator=generator)
    return ids.gather(1, choice)[:, 0]


@torch.no_grad()
def sample(
    model: StoryModel,
    prompt: list[int],
    count: int,
    limit: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[list[int]]:
    """Token ids of stories after id 0 and the prompt, each up to its end of text or ``limit`` tokens."""
    device = model.emb.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    states = [LayerState.zero(model.layer(index), count) for index in range(model.config.layers)]
    logits = torch.empty(0)
    for token in [0, *prompt]:
        logits = model_step(model, torch.full((count,), token, device=device), states)
    drawn = []
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    for position in range(limit):
        tokens = draw(logits, temperature, top_p, generator).masked_fill(ended, 0)
        drawn.append(tokens)
        ended |= tokens == 0
        if position % 32 == 0 and bool(ended.all()):
            break
        logits = model_step(model, tokens, states)
    rows = torch.stack(drawn, dim=1).tolist()  # [B, tokens]
    return [prompt + (row[: row.index(0)] if 0 in row else row) for row in rows]


def read_vocabulary(path: Path) -> Tokenizer:
    """The runtime's tokenizer; imported late, so that token ids can be sampled where the runtime cannot be had."""
    from rwkv_runtime.tokenizer import Tokenizer

    return Tokenizer.from_file(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample stories from an exported checkpoint.")
    parser.add_argument("model", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=600, help="at most so many for each story")
    parser.add_argument("--prompt", default="", help="text that every story begins with")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    model = load_model(a.model).to(a.device)
    prompt = read_vocabulary(a.vocabulary).encode(a.prompt) if a.prompt else []
    stories = sample(model, prompt, a.count, a.tokens, a.temperature, a.top_p, a.seed)
    a.output.with_suffix(".ids.json").write_text(json.dumps(stories), encoding="utf-8")
    tokenizer = read_vocabulary(a.vocabulary)
    text = "".join(f"{tokenizer.decode(story)}\n{SEPARATOR}\n" for story in stories)
    a.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

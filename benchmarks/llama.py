"""llama.cpp on the CPU, through llama-cpp-python: the checkpoint as a GGUF file, and batches of sequences.

Tensor names and layouts are those of llama.cpp's own converter. Vectors and adapters are float32, as that writes
them, matrices stay in the checkpoint's dtype; nothing is rescaled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import Checkpoint
from benchmarks.room import require_disk

LLAMA = "llama.cpp"
UBATCH = 512
SHIFTS = {"rwkv6": ("time_maa_", "wkvrg"), "rwkv7": ("x_", "rwkvag")}
"""By architecture: what the parameters of the token shift are called, and the order in which they are stacked."""
MODEL = {"emb": "token_embd", "ln_out": "output_norm", "head": "output", "blocks.0.ln0": "token_embd_norm"}
BLOCK = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_faaaa": "time_mix_first",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    "ffn.x_k": "channel_mix_lerp_k",
    **{f"att.{name}": f"time_mix_{name}" for name in ("receptance", "key", "value", "gate", "output")},
    **{f"att.{letter}{i}": f"time_mix_{letter}{i}" for letter in "wavg" for i in range(3)},
    **{f"att.{name}": f"time_mix_{name}" for name in ("k_k", "k_a", "r_k")},
    **{f"ffn.{name}": f"channel_mix_{name}" for name in ("receptance", "key", "value")},
}
ADAPTERS = {
    *(f"att.time_{name}" for name in ("maa_w1", "decay_w1", "decay_w2")),
    *(f"att.{letter}{i}" for letter in "wavg" for i in (1, 2)),
}
"""Are turned round."""


def why_no_llama(checkpoint: Checkpoint, device: torch.device) -> str | None:
    """None where llama.cpp can take part."""
    missing = [name for name, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf")) if not find_spec(module)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if device.type != "cpu":
        return "compared on the CPU only"
    return None if checkpoint.architecture.name in SHIFTS else f"no GGUF is written of {checkpoint.architecture.name}"


def gguf_tensors(tensors: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint under llama.cpp's names and in its layouts; what it wants in float32 is that."""
    prefix, order = SHIFTS[architecture]
    found: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        stem, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        if stem in MODEL:
            found[f"{MODEL[stem]}.{kind}"] = t if t.dim() > 1 else t.float()
            continue
        _, layer, part = stem.split(".", 2)
        letter = part.removeprefix(f"att.{prefix}")
        if letter in order:
            stacked.setdefault(layer, {})[letter] = t.reshape(-1).float()
        else:
            found[f"blk.{layer}.{BLOCK[part]}.{kind}"] = _laid_out(part, t)
    for layer, parts in stacked.items():
        lerp = torch.stack([parts[letter] for letter in order])  # [n, C]
        found[f"blk.{layer}.time_mix_lerp_fused.weight"] = lerp.view(len(order), 1, 1, -1)
    if architecture == "rwkv7":  # the first layer's value mix is read, but not used
        found |= {f"blk.0.time_mix_v{i}.weight": found[f"blk.0.time_mix_a{i}.weight"] for i in range(3)}
    return found


def _laid_out(part: str, t: Tensor) -> Tensor:
    if part in ADAPTERS:
        return t.t().float()
    if part == "att.time_maa_w2":
        return t.permute(0, 2, 1).float()
    if part == "att.r_k":
        return t.reshape(-1).float()
    return t if t.dim() == 2 and part != "att.time_faaaa" else t.float()


def write_gguf(checkpoint: Checkpoint) -> Path:
    """The file of a checkpoint, written when first asked for."""
    import gguf

    path = checkpoint.pth.with_suffix(".gguf")
    if path.exists():
        return path
    require_disk(checkpoint.nbytes, path.parent)
    tensors = checkpoint.tensors()
    config = checkpoint.architecture.config({name: tuple(t.shape) for name, t in tensors.items()})
    writer: Any = gguf.GGUFWriter(path, checkpoint.architecture.name)
    writer.add_context_length(1 << 20)  # none is meant
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(0)
    writer.add_wkv_head_size(config.head_size)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    ranks = config.ranks
    if checkpoint.architecture.name == "rwkv6":
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(ranks["maa"])
        writer.add_time_decay_extra_dim(ranks["decay"])
    else:
        writer.add_decay_lora_rank(ranks["decay"])
        writer.add_iclr_lora_rank(ranks["rate"])
        writer.add_value_residual_mix_lora_rank(ranks["value"])
        writer.add_gate_lora_rank(ranks["gate"])
    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for name, t in gguf_tensors(tensors, checkpoint.architecture.name).items():
        writer.add_tensor(name, t.contiguous().view(torch.uint8).numpy(), raw_dtype=kinds[t.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """A checkpoint in llama.cpp."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = write_gguf(checkpoint)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab_size = checkpoint.tensors()["head.weight"].shape[0]
        self._prefiller: Sequences | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        rows, length = len(prompts), len(prompts[0])
        if self._prefiller is None or self._prefiller.capacity < rows * length or self._prefiller.rows != rows:
            self._prefiller = Sequences(self, rows, rows * length)
        self._prefiller.clear()
        return self._prefiller.read(prompts)

    def decoder(self, rows: int) -> LlamaDecoder:
        return LlamaDecoder(Sequences(self, rows, rows))


class Sequences:
    """A context of llama.cpp: `rows` sequences, each with a state of its own."""

    def __init__(self, llama: LlamaCpp, rows: int, capacity: int) -> None:
        self.api, self.llama, self.rows, self.capacity = llama.api, llama, rows, capacity
        params = self.api.llama_context_default_params()
        params.n_ctx = 1 << 20
        params.n_batch, params.n_ubatch = max(capacity, 32), min(max(capacity, 32), UBATCH)
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = self.api.llama_init_from_model(llama.model, params)
        assert self.context, "llama.cpp makes no context"
        self.batch = self.api.llama_batch_init(capacity, 0, 1)
        self.position = 0

    def __del__(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Each row reads its tokens, all equally many; logits [B, V] after the last ones."""
        batch, length = self.batch, len(tokens[0])
        batch.n_tokens = len(tokens) * length
        for row, own in enumerate(tokens):
            for place, token in enumerate(own):
                i = row * length + place
                batch.token[i], batch.pos[i] = token, self.position + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = place == length - 1
        status = self.api.llama_decode(self.context, batch)
        assert status == 0, f"llama.cpp does not decode: {status}"
        self.position += length
        address = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.c_void_p).value
        size = len(tokens) * self.llama.vocab_size
        memory = (ctypes.c_float * size).from_address(address or 0)
        return torch.frombuffer(memory, dtype=torch.float32).view(len(tokens), -1)


class LlamaDecoder:
    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.tokens = [[0]] * sequences.rows

    def feed(self, tokens: Sequence[int]) -> None:
        self.tokens = [[token] for token in tokens]

    def step(self) -> Tensor:
        return self.sequences.read(self.tokens)

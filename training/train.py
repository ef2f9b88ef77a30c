"""Train the story model.

Usage: ``python -m training.train DATA_FOLDER RUN_FOLDER [--minutes M]``.  Started again with the same run folder
it resumes from ``last.pt``; batches and dropout depend on the seed and the step alone, so a resumed run repeats an
uninterrupted one.  Writes ``log.jsonl``, ``last.pt``, ``stable.pt`` (the state at the start of the decay phase,
from which other decay phases can be tried with ``--start-from``) and, at the end, ``model.safetensors``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data import Heldout, Windows
from training.export import export
from training.model import ModelConfig, StoryModel
from training.schedule import DECAY_MIX, MAIN_MIX, Budget, Schedule, format_mix, parse_mix


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run depends on besides its data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: Schedule = field(default_factory=Schedule)
    budget: Budget = field(default_factory=lambda: Budget(15000))
    main_mix: Mapping[str, float] = field(default_factory=lambda: MAIN_MIX)
    decay_mix: Mapping[str, float] = field(default_factory=lambda: DECAY_MIX)
    rows: int = 32
    length: int = 1024
    at_start: float = 0.3  # share of windows that begin with a document, as generation does
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    compiled: bool = True
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_seconds: float = 75.0
    heldout_windows: int = 64  # of each source


def make_optimizer(model: StoryModel, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW: matrices with weight decay, the rest without, base decay and bonus also at twice the rate."""
    decayed, plain, double = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("time_decay", "time_faaaa")):
            double.append(parameter)
        elif name.endswith("weight") and parameter.ndim == 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "scale": 1.0},
        {"params": double, "weight_decay": 0.0, "scale": 2.0},
    ]
    fused = plain[0].is_cuda
    return torch.optim.AdamW(groups, lr=options.schedule.peak, betas=(0.9, 0.95), eps=1e-9, fused=fused)


class Trainer:
    """A model, its optimizer and its place in the run."""

    def __init__(self, options: TrainOptions, windows: Windows, heldout: Heldout | None, folder: Path) -> None:
        self.options, self.windows, self.heldout, self.folder = options, windows, heldout, folder
        self.device = windows.tokens.device
        torch.manual_seed(options.seed)
        dtype = torch.bfloat16 if options.compiled or self.device.type == "cuda" else torch.float32
        self.model = StoryModel(options.model, dtype).to(self.device)
        self.optimizer = make_optimizer(self.model, options)
        if options.compiled:
            self.model.compile_parts()
        self.main_weights = windows.weights(options.main_mix)
        self.decay_weights = windows.weights(options.decay_mix)
        self.generator = torch.Generator(self.device)
        self.step = 0
        self.seconds = 0.0  # of earlier sittings
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training in all sittings."""
        return self.seconds + time.perf_counter() - self.started

    def progress(self) -> float:
        return self.options.budget.progress(self.step, self.elapsed())

    def train_step(self, progress: float) -> tuple[Tensor, Tensor]:
        """One update; the loss (nats a token) and the gradient norm stay on the device."""
        options = self.options
        decaying = options.schedule.decaying(progress)
        # Dropout and batches are functions of seed and step: nothing random has to be saved.
        seed = options.seed * 1_000_003 + self.step
        torch.manual_seed(seed)
        self.generator.manual_seed(seed)
        weights = self.decay_weights if decaying else self.main_weights
        inputs, targets = self.windows.batch(weights, options.rows, options.length, options.at_start, self.generator)
        rate = options.schedule.rate(self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = self.model.losses(inputs, targets).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Bits per byte of the fixed held-out windows, by source."""
        if self.heldout is None:
            return {}
        rows, heldout = self.options.rows, self.heldout
        self.model.eval()
        nats = torch.zeros(len(heldout.names), device=self.device, dtype=torch.float64)
        for start in range(0, len(heldout.windows), rows):
            windows = heldout.windows[start : start + rows]  # [<= B, T + 1]
            count = len(windows)
            # A short last batch is filled up with windows that count nothing: one compiled shape.
            windows = torch.nn.functional.pad(windows, (0, 0, 0, rows - count), value=-100)
            losses = self.model.losses(windows[:, :-1].clamp(min=0), windows[:, 1:]).view(rows, -1)
            nats.index_add_(0, heldout.source[start : start + rows], losses.double().sum(1)[:count])
        self.model.train()
        bits = (nats / math.log(2) / heldout.bytes).tolist()
        return dict(zip(heldout.names, bits, strict=True))

    def save(self, name: str) -> None:
        """Write a checkpoint; it appears under its name only when it is whole."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.elapsed(),
        }
        partial = self.folder / f"{name}.partial"
        torch.save(content, partial)
        os.replace(partial, self.folder / name)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds = content["step"], content["seconds"]
        self.started = time.perf_counter()

    def log(self, record: Mapping[str, Any]) -> None:
        """Print a record and append it to the log."""
        text = json.dumps({"step": self.step, "seconds": round(self.elapsed(), 1), **record})
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self) -> None:
        """Train until the budget is spent.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint is from before.
        """
        options = self.options
        losses: list[Tensor] = []
        first_time, logged, saved = True, time.perf_counter(), time.perf_counter()
        was_decaying = options.schedule.decaying(self.progress())
        while (progress := self.progress()) < 1.0:
            if options.schedule.decaying(progress) and not was_decaying:
                was_decaying = True
                self.save("stable.pt")
                self.log({"event": "decay begins", "progress": progress})
            loss, norm = self.train_step(progress)
            losses.append(loss)
            if first_time:
                first_time = False
                self.log({"event": "first step, compilation included", "loss": loss.item()})
            if self.step % options.log_every == 0:
                mean = torch.stack(losses).mean().item()  # the only wait for the device
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} before step {self.step}")
                speed = len(losses) * options.rows * options.length / (time.perf_counter() - logged)
                rate = options.schedule.rate(self.step, progress)
                record = {"loss": mean, "rate": rate, "norm": norm.item(), "tokens_per_second": round(speed)}
                self.log({**record, "progress": round(progress, 4)})
                losses = []
                if time.perf_counter() - saved > options.checkpoint_seconds:
                    saved = time.perf_counter()
                    self.save("last.pt")
                logged = time.perf_counter()
            if self.step % options.evaluate_every == 0:
                self.log({"heldout": self.evaluate()})
                logged, losses = time.perf_counter(), []
        self.save("last.pt")
        self.log({"event": "end", "heldout": self.evaluate(), "peak_memory_gib": self.peak_memory()})

    def peak_memory(self) -> float:
        """Largest memory allocated on the device, in GiB; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


def parse_options() -> tuple[argparse.Namespace, TrainOptions]:
    """Command line of ``python -m training.train``."""
    base = TrainOptions()
    parser = argparse.ArgumentParser(description="Train the story model.")
    parser.add_argument("data", type=Path, help="folder that training.prepare wrote")
    parser.add_argument("run", type=Path, help="folder of log, checkpoints and model; resumed if it has a last.pt")
    parser.add_argument("--minutes", type=float, help="end after so many minutes, fully annealed")
    parser.add_argument("--steps", type=int, default=base.budget.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start-from", type=Path, help="checkpoint to begin from if the run has none")
    parser.add_argument("--main-mix", type=parse_mix, default=base.main_mix, help=format_mix(MAIN_MIX))
    parser.add_argument("--decay-mix", type=parse_mix, default=base.decay_mix, help=format_mix(DECAY_MIX))
    parser.add_argument("--width", type=int, default=base.model.width)
    parser.add_argument("--layers", type=int, default=base.model.layers)
    parser.add_argument("--dropout", type=float, default=base.model.dropout)
    parser.add_argument("--chunk", type=int, default=base.model.chunk)
    parser.add_argument("--rate", type=float, default=base.schedule.peak)
    parser.add_argument("--warmup-steps", type=int, default=base.schedule.warmup_steps)
    parser.add_argument("--decay-share", type=float, default=base.schedule.decay_share)
    for name in ("rows", "length", "log_every", "evaluate_every", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(base, name))
    parser.add_argument("--weight-decay", type=float, default=base.weight_decay)
    parser.add_argument("--checkpoint-seconds", type=float, default=base.checkpoint_seconds)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    a = parser.parse_args()
    options = TrainOptions(
        model=ModelConfig(width=a.width, layers=a.layers, dropout=a.dropout, chunk=a.chunk),
        schedule=Schedule(a.rate, a.warmup_steps, a.decay_share),
        budget=Budget(a.steps, a.minutes),
        main_mix=a.main_mix,
        decay_mix=a.decay_mix,
        rows=a.rows,
        length=a.length,
        weight_decay=a.weight_decay,
        seed=a.seed,
        compiled=a.compiled,
        log_every=a.log_every,
        evaluate_every=a.evaluate_every,
        checkpoint_seconds=a.checkpoint_seconds,
    )
    return a, options


def main() -> None:
    arguments, options = parse_options()
    started = time.perf_counter()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # The products inside the WKV are fp32; their inputs come from bf16 ones, so tf32 loses nothing.
        torch.set_float32_matmul_precision("high")
    arguments.run.mkdir(parents=True, exist_ok=True)
    windows = Windows.load(arguments.data, device)
    heldout = Heldout.load(arguments.data, options.length, options.heldout_windows, options.model.vocab_size, device)
    trainer = Trainer(options, windows, heldout, arguments.run)
    trainer.started = started
    last = arguments.run / "last.pt"
    checkpoint = last if last.exists() else arguments.start_from
    if checkpoint is not None:
        trainer.load(checkpoint)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.log({"event": "start", "options": asdict(options), "parameters": parameters})
    trainer.run()
    export(trainer.model.state_dict(), arguments.run / "model.safetensors")


if __name__ == "__main__":
    main()

"""Train the story model.

Usage: ``python -m training.train DATA_FOLDER RUN_FOLDER [--minutes M]``.  Started again with the same run folder
it resumes from ``last.pt``; batches and dropout depend on the seed and the step alone, so a resumed run repeats an
uninterrupted one.  Writes ``log.jsonl``, ``last.pt``, ``stable.pt`` (the state at the start of the decay phase,
from which other decay phases can be tried with ``--start-from``), ``best.pt`` (the best of the decay phase by held-out
loss) and, at the end, that one as ``model.safetensors``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.best import Best
from training.data import Heldout, Windows
from training.export import export
from training.model import StoryModel
from training.optimizers import CapturedUpdate, Update, make_optimizers, restore, set_rate
from training.options import TrainOptions, parse_options


class Trainer:
    """A model, its optimizers and its place in the run."""

    def __init__(self, options: TrainOptions, windows: Windows, heldout: Heldout | None, folder: Path) -> None:
        self.options, self.windows, self.heldout, self.folder = options, windows, heldout, folder
        self.device = windows.tokens.device
        torch.manual_seed(options.seed)
        dtype = torch.bfloat16 if options.compiled or self.device.type == "cuda" else torch.float32
        self.model = StoryModel(options.model, dtype).to(self.device)
        rate = options.schedule.peak
        self.optimizers = make_optimizers(self.model, rate, options.weight_decay, options.optimizer == "muon")
        if options.compiled:
            self.model.compile_parts()
        update = Update(self.model, self.optimizers, options.clip)
        self.update = CapturedUpdate(update) if options.captured and self.device.type == "cuda" else update
        self.main_weights = windows.weights(options.main_mix)
        self.decay_weights = windows.weights(options.decay_mix)
        self.generator = torch.Generator(self.device)
        self.best = self.start_of_best()
        self.step = 0
        self.seconds = 0.0  # of earlier sittings
        self.started = time.perf_counter()

    def start_of_best(self) -> Best | None:
        """Nothing seen yet; None where nothing is held out or the last checkpoint is wanted.

        Raises:
            ValueError: a source is not among those held out.
        """
        if self.heldout is None or not self.options.best_of:
            return None
        unknown = sorted(set(self.options.best_of) - set(self.heldout.names))
        if unknown:
            raise ValueError(f"unknown sources {unknown} to choose a checkpoint by; there are {self.heldout.names}")
        return Best(self.options.best_of)

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
        set_rate(self.optimizers, options.schedule.rate(self.step, progress))
        self.step += 1
        return self.update(inputs, targets)

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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.elapsed(),
            "best": None if self.best is None else (self.best.bits, self.best.step),
        }
        partial = self.folder / f"{name}.partial"
        torch.save(content, partial)
        os.replace(partial, self.folder / name)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        restore(self.optimizers, content["optimizers"])
        self.step, self.seconds = content["step"], content["seconds"]
        # Of another run's checkpoints the best one is not here.
        if self.best is not None and path.parent == self.folder and content.get("best") is not None:
            self.best.bits, self.best.step = content["best"]
        self.started = time.perf_counter()

    def report_heldout(self, decaying: bool, **more: Any) -> None:
        """Evaluate, log it and keep the checkpoint if it is the best of the decay phase."""
        heldout = self.evaluate()
        self.log({**more, "heldout": heldout})
        if decaying and self.best is not None and self.best.improved(heldout, self.step):
            self.save("best.pt")
            self.log({"event": "best", "bits": self.best.bits})

    def chosen(self) -> Path:
        """The checkpoint to export once the run has ended."""
        kept = self.best is not None and self.best.step > 0
        return self.folder / ("best.pt" if kept else "last.pt")

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
        decaying = options.schedule.decaying(self.progress())
        while (progress := self.progress()) < 1.0:
            if options.schedule.decaying(progress) and not decaying:
                decaying = True
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
                logged, losses = time.perf_counter(), []
            if self.step % (options.decay_evaluate_every if decaying else options.evaluate_every) == 0:
                self.report_heldout(decaying)
                logged, losses = time.perf_counter(), []
            # After the evaluation: a resumed run knows of every best.pt that is from before its start.
            if self.step % options.log_every == 0 and time.perf_counter() - saved > options.checkpoint_seconds:
                self.save("last.pt")
                saved = logged = time.perf_counter()
        self.report_heldout(True, event="end", peak_memory_gib=self.peak_memory())
        self.save("last.pt")

    def peak_memory(self) -> float:
        """Largest memory allocated on the device, in GiB; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


def main() -> None:
    arguments, options = parse_options()
    started = time.perf_counter()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        # The products inside the WKV are fp32; their inputs come from bf16 ones, so tf32 loses nothing.
        torch.set_float32_matmul_precision("high")
    arguments.run.mkdir(parents=True, exist_ok=True)
    windows = Windows.load(arguments.data, device, arguments.synthetic)
    heldout = Heldout.load(arguments.data, options.length, options.heldout_windows, options.model.vocab_size, device)
    trainer = Trainer(options, windows, heldout, arguments.run)
    trainer.started = started
    last = arguments.run / "last.pt"
    checkpoint = last if last.exists() else arguments.start_from
    if checkpoint is not None:
        trainer.load(checkpoint)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    read = [path.name for path in arguments.synthetic]
    trainer.log({"event": "start", "options": asdict(options), "parameters": parameters, "synthetic": read})
    trainer.run()
    chosen = torch.load(trainer.chosen(), map_location="cpu", weights_only=True)
    trainer.log({"event": "export", "checkpoint": trainer.chosen().name, "of_step": chosen["step"]})
    export(chosen["model"], arguments.run / "model.safetensors")


if __name__ == "__main__":
    main()

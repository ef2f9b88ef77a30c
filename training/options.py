"""What a training run depends on besides its data, and the command line that says it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from training.model import ModelConfig
from training.schedule import (
    BEST_OF,
    DECAY_MIX,
    MAIN_MIX,
    STUDENT_DECAY_MIX,
    STUDENT_MAIN_MIX,
    Budget,
    Schedule,
    format_mix,
    parse_mix,
)

OPTIMIZERS = ("muon", "adamw")


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
    optimizer: str = "muon"  # of the layers' matrices: or "adamw"
    weight_decay: float = 0.2
    clip: float = 1.0
    seed: int = 1
    compiled: bool = True
    captured: bool = True  # an update as one CUDA graph, on a GPU
    log_every: int = 20
    evaluate_every: int = 500
    decay_evaluate_every: int = 250
    best_of: Sequence[str] = BEST_OF  # sources whose held-out loss says which checkpoint is kept; none: the last
    checkpoint_seconds: float = 75.0
    heldout_windows: int = 64  # of each source


def kernels_wanted(choice: str | None, device: str) -> bool:
    """Whether WKV goes through the Triton kernels: unless told otherwise on CUDA, where Triton is installed.

    Raises:
        ValueError: they are asked for where they cannot run.
    """
    missing = None if device.startswith("cuda") else "a CUDA device"
    if missing is None and find_spec("triton") is None:
        missing = "Triton, which is not installed"
    if choice == "kernels" and missing:
        raise ValueError(f"--wkv kernels needs {missing}; leave it out or use --wkv plain")
    return choice != "plain" and missing is None


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
    for phase, alone, student in (("main", MAIN_MIX, STUDENT_MAIN_MIX), ("decay", DECAY_MIX, STUDENT_DECAY_MIX)):
        help = f"{format_mix(alone)}; with --synthetic {format_mix(student)}"
        parser.add_argument(f"--{phase}-mix", type=parse_mix, help=help)
    parser.add_argument("--width", type=int, default=base.model.width)
    parser.add_argument("--layers", type=int, default=base.model.layers)
    parser.add_argument("--dropout", type=float, default=base.model.dropout)
    parser.add_argument("--chunk", type=int, default=base.model.chunk)
    parser.add_argument("--rate", type=float, default=base.schedule.peak)
    parser.add_argument("--warmup-steps", type=int, default=base.schedule.warmup_steps)
    parser.add_argument("--decay-share", type=float, default=base.schedule.decay_share)
    parser.add_argument("--wkv", choices=["kernels", "plain"], help="Triton's (default on CUDA) or plain torch")
    parser.add_argument("--best-of", default=",".join(base.best_of), help="sources to choose a checkpoint by, or ''")
    for name in ("rows", "length", "log_every", "evaluate_every", "decay_evaluate_every", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(base, name))
    parser.add_argument("--synthetic", type=Path, action="append", default=[], help="what training.synthesise wrote")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=base.optimizer, help="of the layers' matrices")
    parser.add_argument("--weight-decay", type=float, default=base.weight_decay)
    parser.add_argument("--checkpoint-seconds", type=float, default=base.checkpoint_seconds)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--no-capture", dest="captured", action="store_false", help="no CUDA graph")
    a = parser.parse_args()
    try:
        kernels = kernels_wanted(a.wkv, a.device)
    except ValueError as error:
        parser.error(str(error))
    main_mix, decay_mix = (STUDENT_MAIN_MIX, STUDENT_DECAY_MIX) if a.synthetic else (MAIN_MIX, DECAY_MIX)
    options = TrainOptions(
        model=ModelConfig(width=a.width, layers=a.layers, dropout=a.dropout, chunk=a.chunk, kernels=kernels),
        schedule=Schedule(a.rate, a.warmup_steps, a.decay_share),
        budget=Budget(a.steps, a.minutes),
        main_mix=a.main_mix or main_mix,
        decay_mix=a.decay_mix or decay_mix,
        rows=a.rows,
        length=a.length,
        optimizer=a.optimizer,
        weight_decay=a.weight_decay,
        seed=a.seed,
        compiled=a.compiled,
        captured=a.captured,
        log_every=a.log_every,
        evaluate_every=a.evaluate_every,
        decay_evaluate_every=a.decay_evaluate_every,
        best_of=[name.strip() for name in a.best_of.split(",") if name.strip()],
        checkpoint_seconds=a.checkpoint_seconds,
    )
    return a, options

"""The story model from the corpus: ``python -m training.reproduce CORPUS RUN``.

Prepares the text, trains two teachers, has them write, and trains the model on the corpus and on that: each step a
command of its own, printed before it runs.  Started again it leaves out what is done, and a run of training resumes.
About half an hour on one H100; the minutes are of training, each run's.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

UNLIMITED = ("--steps", "60000")  # the minutes end a run


class Step(NamedTuple):
    """A module of this package, its arguments, and the file that is there once it has ended."""

    module: str
    arguments: Sequence[object]
    result: Path


def steps(corpus: Path, run: Path) -> list[Step]:
    """What has to be done, in order."""
    data, texts = run / "data", [run / "one.npy", run / "two.npy"]
    teachers = {
        run / "teacher-a": ("--minutes", 8.9, "--width", 512, "--layers", 12, "--dropout", 0.25, "--seed", 1),
        run / "teacher-b": ("--minutes", 7.6, "--width", 384, "--layers", 12, "--dropout", 0.2, "--seed", 2),
    }
    models = [folder / "model.safetensors" for folder in teachers]
    write = (*models, "--tokens", 18_000_000)
    read = [word for text in texts for word in ("--synthetic", text)]
    story = run / "story"
    return [
        Step("prepare", (corpus, data), data / "meta.json"),
        *(
            Step("train", (data, folder, *UNLIMITED, "--warmup-steps", 200, *options), model)
            for (folder, options), model in zip(teachers.items(), models, strict=True)
        ),
        *(Step("synthesise", (data, text, *write, "--seed", seed), text) for seed, text in enumerate(texts, start=1)),
        Step("train", (data, story, *UNLIMITED, "--minutes", 7.5, *read), story / "model.safetensors"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the story model, from the corpus on.")
    parser.add_argument("corpus", type=Path, help="folder of <source>.txt.xz")
    parser.add_argument("run", type=Path, help="folder for everything that is made")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    options = parser.parse_args(argv)
    options.run.mkdir(parents=True, exist_ok=True)
    for step in steps(options.corpus, options.run):
        if step.result.exists():
            print(f"# {step.result} is there", flush=True)
            continue
        command = [sys.executable, "-m", f"training.{step.module}", *map(str, step.arguments)]
        print(shlex.join(["python", *command[1:]]), flush=True)
        if options.dry_run:
            continue
        if code := subprocess.run(command).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

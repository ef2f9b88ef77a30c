"""Put a trained model into the package: ``python -m training.publish MODEL VOCABULARY FOLDER``.

Copies both and writes ``story.json``, by which the runtime notices a damaged file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path


def publish(model: Path, vocabulary: Path, folder: Path) -> None:
    """Copies the files under their packaged names, with their sizes and SHA-256 beside them."""
    facts = {}
    for source, name in ((model, "story.safetensors"), (vocabulary, "story.vocab.txt")):
        target = folder / name
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
        content = target.read_bytes()
        facts[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "story.json").write_text(json.dumps({"files": facts}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a trained model into the package.")
    parser.add_argument("model", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    publish(arguments.model, arguments.vocabulary, arguments.folder)


if __name__ == "__main__":
    main()

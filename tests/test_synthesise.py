"""Text that teachers write for the story model to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_runtime import Model, Plugins
from rwkv_runtime.checkpoint import build_model
from training.arrays import save_tokens
from training.data import Windows
from training.synthesise import Writers, find_openings, synthesise, whole_documents

V = 40


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def teacher(plugins: Plugins, seed: int) -> Model:
    architecture = plugins.architectures.get("rwkv6")
    tensors = architecture.random(architecture.sizes(1, 32, V, head_size=32), seed)
    return build_model(tensors, [architecture], torch.device("cpu"))


def writers(plugins: Plugins, *seeds: int, rows: int = 4, length: int = 64) -> Writers:
    openings = torch.tensor([[0, 7, 8], [0, 9, 10]])
    models = [teacher(plugins, seed) for seed in seeds]
    return Writers(models, plugins.backends.get("eager"), rows, length, openings)


def test_texts_begin_as_documents_do_and_differ(plugins: Plugins) -> None:
    torch.manual_seed(1)
    texts = writers(plugins, 1, 2).write()
    assert texts.shape == (4, 64)
    assert {tuple(row[:3]) for row in texts.tolist()} <= {(0, 7, 8), (0, 9, 10)}
    assert len({tuple(row) for row in texts.tolist()}) == 4
    assert texts.min() >= 0
    assert texts.max() < V


def test_each_batch_of_texts_begins_afresh(plugins: Plugins) -> None:
    """The same seed writes the same texts, whatever was written before."""
    writing = writers(plugins, 3)
    batches = []
    for _ in range(2):
        torch.manual_seed(5)
        batches.append(writing.write())
    assert torch.equal(*batches)


def test_teachers_draw_from_the_mean_of_what_they_expect(plugins: Plugins) -> None:
    rows = 20_000
    torch.manual_seed(2)
    writing = writers(plugins, 1, 2, rows=rows, length=4)
    drawn = writing.write()[:, 3]
    for opening in ([0, 7, 8], [0, 9, 10]):
        expected = torch.zeros(V)
        for seed in (1, 2):
            model = teacher(plugins, seed)
            state = model.new_state()
            forward = plugins.backends.get("eager").forward(model)
            for token in opening:
                logits = forward(torch.tensor([[token]]), state)
            expected += logits[0].softmax(-1) / 2
        begun = (writing.begin == torch.tensor(opening)).all(1)
        counts = torch.bincount(drawn[begun], minlength=V)
        likely = expected * counts.sum()
        statistic = float(((counts - likely).square() / likely).sum())
        assert statistic < 39 + 5 * (2 * 39) ** 0.5  # chi squared with V - 1 degrees of freedom


def test_only_whole_documents_are_kept() -> None:
    texts = torch.tensor([[0, 5, 6, 0, 7], [0, 5, 0, 6, 0], [0, 1, 2, 3, 4]])
    assert whole_documents(texts).tolist() == [0, 5, 6, 0, 5, 0, 6]


def test_openings_are_those_of_documents_that_are_long_enough() -> None:
    tokens = np.array([0, 1, 2, 3, 0, 4, 0, 5, 6], dtype=np.uint16)
    assert find_openings(tokens, 3).tolist() == [[0, 1, 2], [0, 5, 6]]


def test_as_much_is_written_as_was_asked_for(plugins: Plugins) -> None:
    torch.manual_seed(3)
    tokens = synthesise(writers(plugins, 1, rows=8, length=256), 1500)
    assert tokens.dtype == np.uint16
    assert len(tokens) >= 1500
    assert tokens[0] == 0
    assert len(synthesise(writers(plugins, 1, rows=8, length=256), 10**9, seconds=1e-9)) <= 8 * 256


def test_texts_that_never_end_are_complained_of(plugins: Plugins) -> None:
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="only 0 are in texts that end: give them more --length"):
        synthesise(writers(plugins, 1, rows=1, length=4), 10)


def test_synthetic_text_is_one_more_source(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"sources": {"corpus": {}}}')
    save_tokens(tmp_path / "corpus.train.npy.xz", np.array([0, 1, 2, 3], dtype=np.uint16))
    files = [tmp_path / "one.npy", tmp_path / "two.npy"]
    for first, file in enumerate(files):
        np.save(file, np.array([0, 8 + first], dtype=np.uint16))
    windows = Windows.load(tmp_path, torch.device("cpu"), files)
    assert windows.names == ["corpus", "synthetic"]
    assert windows.tokens.tolist() == [0, 1, 2, 3, 0, 8, 0, 9]
    assert windows.weights({"corpus": 1.0, "synthetic": 3.0}).tolist() == [0.25, 0.75]

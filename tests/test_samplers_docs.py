"""docs/sampling.md says of the samplers what the code says."""

from __future__ import annotations

import pytest
from distributions import ROOT

from benchmarks.sampling_figures import PAGE, distinct, repeated, replace_part, sampler_table
from rwkv_runtime.plugins import Plugins


def test_the_table_of_samplers_is_the_codes(plugins: Plugins) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert replace_part(page, "samplers", sampler_table(plugins)) == page, "run: python -m benchmarks.sampling_figures"


def test_every_picture_is_there_and_small() -> None:
    for name in ("samplers-kept", "samplers-repetition"):
        assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < 100_000


def test_repetition_is_measured_as_it_is_defined() -> None:
    assert repeated([[1, 2, 1, 2, 1]], 2) == pytest.approx(0.5)  # 12 and 21 come twice
    assert repeated([[1, 2, 3], [1, 2, 3]], 2) == 0.0  # another text's do not count
    assert distinct([[1, 2, 3], [1, 2, 3]], 2) == pytest.approx(0.5)
    assert distinct([[1]], 2) == repeated([[1]], 2) == 0.0

from __future__ import annotations

import pytest
import torch
from rwkv_sampler_top_a import TopA

from rwkv_runtime import Plugins
from rwkv_runtime.testing import check_sampler, distribution, tiny_model


def test_it_keeps_the_rules_of_samplers():
    assert check_sampler(TopA()) is None


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        ([0.90, 0.08, 0.02], [1, 0, 0]),  # floor 0.2 * 0.81 = 0.162
        ([0.50, 0.30, 0.15, 0.04, 0.01], [1, 1, 1, 0, 0]),  # 0.05
        ([0.1] * 9 + [0.099, 0.001], [1] * 10 + [0]),  # 0.002
    ],
)
def test_the_surer_the_model_the_fewer_tokens_are_kept(p: list[float], kept: list[int]):
    expected = torch.tensor(p, dtype=torch.float64) * torch.tensor(kept)
    got = distribution(TopA(), torch.tensor(p).log(), top_a=0.2)
    torch.testing.assert_close(got[0], expected / expected.sum(), rtol=1e-6, atol=1e-7)


def test_zero_turns_it_off():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(distribution(TopA(), logits, top_a=0), logits.double().softmax(-1))


def test_it_writes_text_by_its_name():
    plugins = Plugins.load()
    if "top-a" not in plugins.samplers.names():
        pytest.skip("the distribution is not installed; run: pip install -e .")
    model = tiny_model(plugins=plugins)
    texts = ["".join(model.generate("Hi", sampler="top-a", max_tokens=8, seed=1, top_a=a)) for a in (1.0, 1.0)]
    assert texts[0] == texts[1] != ""

"""The optimizer of the layers' large matrices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 64, 32), (2, 32, 80), (1, 48, 48)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(given))
    assert values.min() > 0.5
    assert values.max() < 1.4
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalised(given).flatten(), (left @ right).flatten(), 0) > 0.97


def test_muon_updates_matrices_of_one_shape_as_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(32, 16), (32, 16), (16, 16)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]

    def after(places: Sequence[int]) -> list[Tensor]:
        parameters = [torch.nn.Parameter(start[place].clone()) for place in places]
        optimizer = Muon([{"params": parameters}], lr=0.01, momentum=0.9, weight_decay=0.5)
        for step in gradients:
            for parameter, place in zip(parameters, places, strict=True):
                parameter.grad = step[place]
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    together = after([0, 1, 2])
    for place in range(3):
        torch.testing.assert_close(together[place], after([place])[0], rtol=1e-3, atol=1e-4)
    # The size of AdamW's updates, whatever the size of the gradients.
    change = together[0] - start[0] * (1 - 0.01 * 0.5) ** 2
    assert 0.1 < change.square().mean().sqrt() / 0.02 < 0.3

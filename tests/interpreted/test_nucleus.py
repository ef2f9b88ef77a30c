"""The nucleus draw for GPUs draws what its plain twin draws."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from rwkv_samplers.kernels import gumbel
from rwkv_samplers.kernels import nucleus as kernels
from rwkv_samplers.nucleus import Nucleus, Packed
from torch import Tensor

from rwkv_runtime import noise
from rwkv_runtime.controls import Controls

INF = torch.inf


def both(logits: Tensor, **params: list[float]) -> tuple[list[int], list[int]]:
    """Tokens of the plain draw and of the kernels, for logits [B, V] and parameters with a value for each row."""
    B, V = logits.shape
    generator = torch.Generator().manual_seed(V)
    controls = Controls.allocate(Nucleus(), B, V, torch.device("cpu"))
    for name, values in params.items():
        controls[name].copy_(torch.tensor(values)[:, None])
    controls.seed.copy_(torch.randint(-(1 << 62), 1 << 62, (B, 1), generator=generator))
    controls.position.copy_(torch.randint(1 << 40, (B, 1), generator=generator))
    plain = Controls.draw(controls, Nucleus().filter(logits, controls))
    return plain.tolist(), kernels.sample(logits, controls, *Packed.of(V)).tolist()


@pytest.mark.parametrize("V", [1, 7, 257, 4096, 9000])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_the_same_tokens_as_the_plain_draw(V: int, spread: float) -> None:
    top_p, temperature, top_k = [0.8, 0.3, 1.0, 0.0, 0.999], [1.0, 0.0, 2.0, 0.01], [0, 1, 5, 1 << 31]
    settings = [(p, t, k) for p in top_p for t in temperature for k in top_k][::7]
    logits = torch.randn(len(settings), V, generator=torch.Generator().manual_seed(V)) * spread
    logits[::2] = logits[::2].round()  # many ties
    p, t, k = (list(values) for values in zip(*settings, strict=True))
    plain, fast = both(logits, top_p=p, temperature=t, top_k=k)
    assert fast == plain


@pytest.mark.parametrize("programs", [1, 90])
def test_the_same_tokens_however_many_programs_share_a_row(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, or two: the second has the fewer blocks."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    logits = torch.randn(40, 9000, generator=torch.Generator().manual_seed(3)) * 2
    logits[::2] = logits[::2].round()
    plain, fast = both(logits, top_p=[0.1, 0.5, 0.9, 1.0] * 10, top_k=[0] * 20 + [1, 2, 3, 50, 500] * 4)
    assert fast == plain


@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.3, 1.0])
def test_blocks_that_noise_cannot_lift_are_not_missed(temperature: float) -> None:
    """The only likely tokens are in one block or two."""
    logits = torch.randn(20, 9000, generator=torch.Generator().manual_seed(5))
    logits[:, 5000:5010] += 12.0
    logits[10:, 20] = 14.0
    plain, fast = both(logits, temperature=[temperature] * 20, top_p=[0.97] * 20)
    assert fast == plain


def test_a_row_that_cannot_be_drawn_from_gives_minus_one_and_leaves_the_others_alone() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    logits[0, 5], logits[2, 7], logits[3, 299] = torch.nan, INF, torch.nan
    logits[4] = -INF
    plain, fast = both(logits)
    assert fast == plain
    assert [token < 0 for token in fast] == [True, False, True, True, True, False]


def test_masked_tokens_are_never_drawn_and_the_mass_at_the_cut_is_shared() -> None:
    logits = torch.full((100, 90), -INF)
    logits[:, [10, 50, 89]] = torch.tensor([0.5, 0.25, 0.25]).log()
    plain, fast = both(logits, top_p=[0.75] * 100)
    assert fast == plain
    counts = torch.bincount(torch.tensor(fast), minlength=90)[[10, 50, 89]].tolist()
    assert sum(counts) == 100
    assert 50 < counts[0] < 83  # 0.5 of 0.75, the two ties share the rest
    assert min(counts[1:]) > 5


@triton.jit
def noise_kernel(seed, position, noise, bound, SIZE: tl.constexpr):
    first, second = gumbel.keys(tl.load(seed), tl.load(position))
    ids = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(noise + ids, gumbel.gumbel(ids, first, second))
    tl.store(bound + ids, gumbel.gumbel_bound(ids, first, second))


def test_noise_never_exceeds_its_bound_which_is_near_where_noise_is_large() -> None:
    size = 1 << 20
    ours, bound = torch.empty(size), torch.empty(size)
    seed, position = torch.tensor([[77]]), torch.tensor([[1 << 35]])
    noise_kernel[16,](seed, position, ours, bound, size // 16)
    torch.testing.assert_close(ours, -noise.minus_gumbel(seed, position, torch.arange(size)[None])[0])
    over = bound - ours
    assert bool((over > 5e-5).all())
    assert float(over[ours > 5].max()) < 0.07
    assert int((ours > 5).sum()) > 5000


@pytest.mark.parametrize("temperature", [0.02, 1.0, 1000.0])
def test_the_same_tokens_where_little_of_the_mass_is_kept(temperature: float) -> None:
    """Many candidates are ruled out first."""
    logits = torch.randn(64, 9000, generator=torch.Generator().manual_seed(8)) * 0.3
    plain, fast = both(logits, temperature=[temperature] * 64, top_p=[0.002, 0.02, 0.1, 0.3] * 16)
    assert fast == plain

"""Random numbers from a key: uniform, unrelated for different keys, and the same for the same key anywhere."""

from __future__ import annotations

import pytest
import torch
from helpers import chi_squared, controls_of
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

from rwkv_runtime.noise import minus_gumbel, mix, uniform


def column(values: list[int]) -> Tensor:
    return torch.tensor(values)[:, None]


def numbers(seeds: list[int], positions: list[int], ids: int = 4096, stream: int = 0) -> Tensor:
    return uniform(column(seeds), column(positions), torch.arange(ids)[None], stream)


def uncorrelated(u: Tensor) -> bool:
    """Whether every two rows are as unrelated as independent ones."""
    related = torch.corrcoef(u) - torch.eye(len(u))
    return related.abs().max().item() < 6 / u.shape[1] ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 1 << 40])
def test_numbers_are_uniform_over_ids_and_over_positions(seed: int) -> None:
    for u in (numbers([seed], [7], 1 << 18), numbers([seed] * (1 << 18), list(range(1 << 18)), 1)):
        counts = torch.histc(u, 256, 0.0, 1.0)
        assert chi_squared(counts, torch.full((256,), u.numel() / 256)) > 1e-3
        ordered = u.flatten().double().sort().values
        steps = torch.arange(1, u.numel() + 1).double() / u.numel()
        assert (ordered - steps).abs().max().item() < 2.0 / u.numel() ** 0.5  # Kolmogorov-Smirnov


def test_numbers_lie_inside_the_open_interval_and_gumbel_noise_is_finite() -> None:
    u = numbers([1, 2, 3, 4], [0, 0, 9, 1 << 40], 1 << 19)
    assert 0.0 < float(u.min()) < 1e-5
    assert 1 - 1e-5 < float(u.max()) < 1.0
    noise = -minus_gumbel(column([1]), column([0]), torch.arange(1 << 19)[None])
    assert bool(noise.isfinite().all())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.03)


def test_the_hash_at_its_ends_stays_inside_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0, -1, 0x7FFFFFFF, -(1 << 31)):
        monkeypatch.setattr("rwkv_runtime.noise.mix", lambda x, end=end: torch.full_like(x, end))
        assert 0.0 < float(numbers([1], [1], 1)) < 1.0
        assert bool(minus_gumbel(column([1]), column([1]), torch.tensor([[0]])).isfinite())


def test_neighbouring_seeds_positions_and_streams_are_unrelated() -> None:
    near = list(range(-8, 8))
    assert uncorrelated(numbers(near, [0] * 16))
    assert uncorrelated(numbers([5] * 16, list(range(16))))
    assert uncorrelated(numbers(near, near))
    assert uncorrelated(torch.cat([numbers([5], [0], stream=stream) for stream in range(8)]))
    assert uncorrelated(numbers([3] * 4096, list(range(4096)), 16).T)  # ids, over positions


def test_every_bit_of_a_64_bit_seed_and_position_counts() -> None:
    bits = [0, *(1 << bit for bit in range(63)), -(1 << 63)]
    for u in (numbers(bits, [3] * 65), numbers([3] * 65, bits)):
        assert uncorrelated(u)


def test_no_two_positions_hold_the_same_numbers_in_another_order() -> None:
    smallest = []
    for start in range(0, 600, 100):
        u = numbers([9] * 100, list(range(start, start + 100)), 1 << 14)
        smallest += [tuple(row) for row in u.topk(3, largest=False).values.tolist()]
    assert len(set(smallest)) == 600


def test_the_hash_is_a_bijection() -> None:
    near, far = torch.arange(1 << 18), torch.arange(1 << 18) * 0x4000 - (1 << 31)
    inputs = torch.cat([near, -near - 1, far]).to(torch.int32).unique()
    assert len(mix(inputs.clone()).unique()) == len(inputs)


def test_the_hash_is_the_published_one_in_unsigned_arithmetic() -> None:
    def plain(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % (1 << 32)
        x ^= x >> 15
        x = x * 0x846CA68B % (1 << 32)
        return x ^ x >> 16

    inputs = [0, 1, 2, 0x7FFFFFFF, -1, -2, -(1 << 31), 123456789, -987654321]
    hashed = mix(torch.tensor(inputs, dtype=torch.int32)).tolist()
    assert [h % (1 << 32) for h in hashed] == [plain(x % (1 << 32)) for x in inputs]


def test_a_key_gives_its_number_in_any_shape() -> None:
    u = numbers([1, 2, 3], [4, 5, 6], 50)
    assert torch.equal(numbers([2], [5], 50)[0], u[1])
    ids = torch.tensor([[49, 0, 7]])
    assert torch.equal(uniform(column([3]), column([6]), ids)[0], u[2, ids[0]])


def test_seeds_of_any_size_are_taken_by_their_low_64_bits() -> None:
    logits = torch.zeros(1, 5000)

    def drawn(seed: int) -> int:
        return int(Nucleus().sample(logits, controls_of(Nucleus(), 1, 5000, seed=seed)))

    assert drawn(-1) == drawn((1 << 64) - 1) == drawn((1 << 200) - 1)
    assert drawn(1 << 63) == drawn(-(1 << 63))
    assert len({drawn(seed) for seed in (0, 1, -1, 1 << 32, 1 << 63, (1 << 63) - 1)}) == 6

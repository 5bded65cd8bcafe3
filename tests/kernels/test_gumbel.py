"""The noise is the stated hash, and it is Gumbel-distributed and independent."""

from __future__ import annotations

import math

import torch

from tandem_kernels import gumbel_noise, uniform_bits
from tandem_kernels.gumbel import bits_to_gumbel

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK64
    return x ^ x >> 31


def lowbias32(x: int) -> int:
    x = ((x ^ x >> 16) * 0x7FEB352D) & MASK32
    x = ((x ^ x >> 15) * 0x846CA68B) & MASK32
    return x ^ x >> 16


def stated_bits(seed: int, position: int, token_id: int) -> int:
    """The hash in unbounded integers."""
    key = splitmix64((splitmix64(seed) + position) & MASK64)
    return lowbias32(lowbias32((token_id * 0x9E3779B9 + key) & MASK32) ^ key >> 32)


def test_bits_are_the_stated_hash() -> None:
    seeds = [0, 1, 42, (1 << 63) - 1, -1, -(1 << 63)]
    positions = [0, 1, 7, 100_000, 5, 1 << 40]
    token_ids = [0, 1, 255, 151_935, MASK32 >> 1]
    bits = uniform_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(token_ids))
    assert bits.dtype == torch.int32
    for seed, position, row in zip(seeds, positions, bits.tolist(), strict=True):
        stated = [stated_bits(seed & MASK64, position, token_id) for token_id in token_ids]
        assert [value & MASK32 for value in row] == stated


def test_known_values_do_not_change() -> None:
    """A change would give every resumed request other tokens than its first attempt."""
    bits = uniform_bits(torch.tensor([42]), torch.tensor([7]), torch.arange(3))
    assert [value & MASK32 for value in bits[0].tolist()] == [3033410078, 2857696107, 278765369]


def test_rows_do_not_depend_on_each_other() -> None:
    """Also where there are more elements than one block of the hash."""
    seeds, positions, vocab = torch.arange(40), torch.arange(40) * 3, torch.arange(5000)
    together = gumbel_noise(seeds, positions, vocab)
    for row in (0, 17, 39):
        alone = gumbel_noise(seeds[row : row + 1], positions[row : row + 1], vocab)
        assert torch.equal(together[row], alone[0])
    picked = gumbel_noise(seeds, positions, torch.full((40, 1), 4321))
    assert torch.equal(picked[:, 0], together[:, 4321])


def test_noise_is_gumbel_distributed() -> None:
    """Kolmogorov-Smirnov distance to the Gumbel distribution, over tokens, positions and seeds."""
    count = 200_000
    steps, zeros, one = torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.zeros(1)
    samples = {
        "tokens": gumbel_noise(torch.tensor([1]), torch.tensor([2]), steps)[0],
        "positions": gumbel_noise(zeros, steps, one.long())[:, 0],
        "seeds": gumbel_noise(steps, zeros, one.long())[:, 0],
    }
    for name, noise in samples.items():
        assert noise.isfinite().all()
        exact = torch.exp(-torch.exp(-noise.double().sort().values))
        distance = (exact - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance < 1.95 / math.sqrt(count), name  # exceeded by chance once in a thousand


def test_the_rarest_bits_give_finite_noise() -> None:
    bits = torch.tensor([0, 1, -1, -2, (1 << 31) - 1, -(1 << 31)], dtype=torch.int32)
    noise = torch.empty(6)
    bits_to_gumbel(bits, noise)
    largest, smallest = -math.log(2.0**-32), -math.log(-math.log(2.0**-24))
    middle = -math.log(math.log(2.0))
    expected = torch.tensor([largest, largest, smallest, smallest, middle, middle])
    torch.testing.assert_close(noise, expected, atol=1e-3, rtol=0)


def test_neighbours_are_uncorrelated() -> None:
    noise = gumbel_noise(
        torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300), torch.arange(4)
    ).view(300, 300, 4)
    noise = (noise - noise.mean()) / noise.std()
    for dim in range(3):
        a = noise.narrow(dim, 0, noise.shape[dim] - 1)
        b = noise.narrow(dim, 1, noise.shape[dim] - 1)
        assert abs(float((a * b).mean())) < 4.0 / math.sqrt(a.numel()), dim

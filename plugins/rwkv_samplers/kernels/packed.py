"""Two numbers in one: mass and number of tokens, which one sum adds up; score and token, of which one is highest."""

import triton
import triton.language as tl


@triton.jit
def mass_of(z, top, unit, NARROW: tl.constexpr):
    """The mass of each token as a whole number, rounded to even as torch.round does."""
    mass = tl.exp(z - top) * unit
    mass = tl.where(mass < 8388608.0, (mass + 8388608.0) - 8388608.0, mass)  # 2^23 leaves a fraction no room
    return mass.to(tl.int32) if NARROW else mass.to(tl.int64)


@triton.jit
def tokens_in(weight, BITS: tl.constexpr):
    """How many tokens a sum of weights is of."""
    return weight & ((1 << BITS) - 1)


@triton.jit
def highest_of(score, ids, V):
    """The id with the highest score, the lowest among equals, as `ranked`; -1 where no score is finite."""
    highest = tl.max(score, axis=0)
    lowest = tl.min(tl.where(score == highest, ids, V), axis=0)
    return tl.where((highest > -float("inf")) & (lowest < V), ranked(highest, lowest), -1)


@triton.jit
def ranked(score, token):
    """A score, and below it the token: the higher of two is that of the higher score, or of the lower token."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return (rank << 31) + (0x7FFFFFFF - token)


@triton.jit
def token_of(noisiest):
    return (0x7FFFFFFF - (noisiest & 0x7FFFFFFF)).to(tl.int32)

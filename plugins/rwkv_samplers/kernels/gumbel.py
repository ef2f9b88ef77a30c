"""The noise of `rwkv_runtime.noise` in kernels, and a cheap bound of it."""

import triton
import triton.language as tl


@triton.jit
def keys(seed, position):
    """The two keys of a row: `rwkv_runtime.noise` has them."""
    s, p = _word(seed), _word(position)
    return _mix(s + p * 0x9E3779B9), _mix(s + p * 0x85EBCA6A)


@triton.jit
def _word(x):
    return _mix(_mix(x.to(tl.uint32)) ^ (x >> 32).to(tl.uint32))


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _uniform(ids, first, second):
    """2^31 times the uniform number of each token, in (0, 2^31]."""
    h = _mix(_mix(ids.to(tl.uint32) ^ first) ^ second)
    return (h & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5


@triton.jit
def gumbel(ids, first, second):
    u = _uniform(ids, first, second) * 4.656612873077393e-10
    u = tl.minimum(u, 0.99999994)
    rest = 1.0 - u
    # log1p: the quotient puts back what the subtraction rounded away.
    log_rest = tl.where(rest == 1.0, -u, tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(-log_rest)


@triton.jit
def gumbel_bound(ids, first, second):
    """What the noise does not exceed, by 0.06 at most where it is large; a sixth of the instructions.

    It is -log(-log(1 - u)), less than -log u; the exponent and fraction of a float are below its logarithm.
    """
    bits = _uniform(ids, first, second).to(tl.int32, bitcast=True).to(tl.float32)
    return 109.5174 - bits * 8.262958294867817e-08  # (158 - bits / 2^23) log 2, and 1e-4 for rounding

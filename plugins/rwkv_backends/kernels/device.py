"""What kernels share: functions that run on the device. Annotations are real types, not strings: Triton reads them."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next kernel may start while this one runs, as far as its own `wait_for_earlier`."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier(OVERLAP: tl.constexpr):
    """Until all kernels before this one are done. Only weights, and what this step has not written, may be read before;
    nothing may be written."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def tokens_there(length_ptr, T):
    """How many tokens of a sequence of T are there, the rest being padding: all, or what is at length_ptr."""
    return T if length_ptr is None else tl.load(length_ptr).to(tl.int32)


@triton.jit
def share(index, programs, count):
    """Which of `count` things a program takes: from, to. No program has two more than another."""
    return index * count // programs, (index + 1) * count // programs


@triton.jit
def sigmoid(x):
    """A third of the instructions of tl.sigmoid, which divides, and keeps numbers that are less than 2^-126."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def norm_row(x_ptr, weight_ptr, bias_ptr, cols, mask, C: tl.constexpr):
    """Layer norm of the row of C at x_ptr, float32, rounded as the model keeps it: the state holds the same."""
    weight, bias = load_vector(weight_ptr, cols, mask), load_vector(bias_ptr, cols, mask)
    y = normed_row(load_vector(x_ptr, cols, mask), weight, bias, mask, C)
    return y.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def normed_row(x, weight, bias, mask, C: tl.constexpr):
    """Layer norm of a row that is at hand, zero where the mask is false, float32."""
    apart = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, 0) / C + 1e-5)
    return apart * scale * weight + bias


@triton.jit
def load_vector(ptr, cols, mask):
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_state(at, s):
    """As the state is kept; what is beyond float16's range becomes its largest number, not infinity."""
    if at.dtype.scalar.element_ty == tl.float16:
        s = tl.where(s > 65504.0, 65504.0, tl.where(s < -65504.0, -65504.0, s))  # NaN stays
    tl.store(at, s.to(at.dtype.scalar.element_ty))


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)

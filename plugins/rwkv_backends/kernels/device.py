"""What kernels share: functions that run on the device. Annotations are real types, not strings: Triton reads them."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def norm_row(x_ptr, weight_ptr, bias_ptr, cols, mask, C: tl.constexpr):
    """Layer norm of the row of C at x_ptr, float32, rounded as the model keeps it: the state holds the same."""
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    apart = tl.where(mask, x - tl.sum(x, 0) / C, 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, 0) / C + 1e-5)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return (apart * scale * weight + bias).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def load_vector(ptr, cols, mask):
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)

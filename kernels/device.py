"""Device functions that load and store nothing: activations, their gradients, and casts.

An activation maps its input ``z`` to ``act(z)``. The activation's gradient maps ``(dy, z)`` to
``dy * act'(z)``. ``param`` is leaky_relu's slope, and the other activations don't use it.
Comparisons are written so that NaN passes through, as in torch.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from bnres.kernels.interpreter import is_interpreting

INTERPRETED = tl.constexpr(is_interpreting())

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def identity(z, param):
    return z


@triton.jit
def identity_grad(dy, z, param):
    return dy


@triton.jit
def relu(z, param):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_grad(dy, z, param):
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def relu6(z, param):
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def relu6_grad(dy, z, param):
    return tl.where((z <= 0) | (z >= 6), 0.0, dy)


@triton.jit
def leaky_relu(z, param):
    return tl.where(z > 0, z, z * param)


@triton.jit
def leaky_relu_grad(dy, z, param):
    return tl.where(z > 0, dy, dy * param)


@triton.jit
def hardswish(z, param):
    return z * relu6(z + 3, param) / 6


@triton.jit
def hardswish_grad(dy, z, param):
    return tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z / 3 + 0.5)))


@triton.jit
def sigmoid(z, param):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def sigmoid_grad(dy, z, param):
    s = sigmoid(z, param)
    return dy * (1 - s) * s


@triton.jit
def silu(z, param):
    return z / (1 + tl.exp(-z))


@triton.jit
def silu_grad(dy, z, param):
    s = sigmoid(z, param)
    return dy * s * (1 + z * (1 - s))


@triton.jit
def gelu(z, param):
    return z * 0.5 * (1 + tl.erf(z * SQRT_HALF))


@triton.jit
def gelu_grad(dy, z, param):
    cdf = 0.5 * (1 + tl.erf(z * SQRT_HALF))
    return dy * (cdf + z * INV_SQRT_2_PI * tl.exp(-0.5 * z * z))


@triton.jit
def gelu_tanh(z, param):
    """Returns 0.5 z (1 + tanh(u)) = z sigmoid(2u), where u = sqrt(2/pi) (z + 0.044715 z³)."""
    return z * sigmoid((z + z * z * z * GELU_CUBIC) * SQRT_8_OVER_PI, param)


@triton.jit
def gelu_tanh_grad(dy, z, param):
    s = sigmoid((z + z * z * z * GELU_CUBIC) * SQRT_8_OVER_PI, param)
    du2 = (1 + z * z * GELU_CUBIC * 3) * SQRT_8_OVER_PI
    return dy * (s + z * s * (1 - s) * du2)


@dataclass(frozen=True)
class Activation:
    forward: triton.runtime.JITFunction
    grad: triton.runtime.JITFunction


ACTIVATIONS = {
    "identity": Activation(identity, identity_grad),
    "relu": Activation(relu, relu_grad),
    "relu6": Activation(relu6, relu6_grad),
    "leaky_relu": Activation(leaky_relu, leaky_relu_grad),
    "hardswish": Activation(hardswish, hardswish_grad),
    "sigmoid": Activation(sigmoid, sigmoid_grad),
    "silu": Activation(silu, silu_grad),
    "gelu": Activation(gelu, gelu_grad),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_grad),
}


@triton.jit
def round_to(v, DTYPE: tl.constexpr):
    """Returns ``v`` as DTYPE, rounded to nearest even.

    Triton's interpreter truncates when it casts to bfloat16, so it gets bits that are already
    rounded.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = v.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, rounded.to(tl.float32, bitcast=True), v.to(tl.float32))
    return v.to(DTYPE)


@triton.jit
def bf16_pairs(words):
    """Returns the two bfloat16 values of each 32-bit word as neighbouring fp32 columns."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return tl.interleave(low, high)

"""The activation of a bottleneck adapter and its derivative, tile by tile, in float32."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Within 2e-7 of itself, of small numbers too, where the exponential would leave few digits."""
    size = tl.abs(x)
    power = tl.exp(-2.0 * size)
    far = (1.0 - power) / (1.0 + power)
    square = x * x
    series = -0.005905849393457174 * square + 0.020805368199944496
    series = (series * square - 0.05378668010234833) * square + 0.13331958651542664
    series = (series * square - 0.33333298563957214) * square
    return tl.where(size < 0.6, x + x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def _tanh_slope(x):
    """``1 - tanh(x)²``, whose digits that difference would lose."""
    power = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * power / ((1.0 + power) * (1.0 + power))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal_below(x):
    """The share of a normal distribution that lies below ``x``."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activation(a, NAME: tl.constexpr):
    """``f(a)`` of ``a`` in float32, for each NAME of ``core.problem.ACTIVATIONS``. NaN stays."""
    if NAME == "gelu":
        z = a * _normal_below(a)
    elif NAME == "gelu_tanh":
        z = 0.5 * a * (1.0 + _tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))
    elif NAME == "relu":
        z = tl.where(a < 0.0, 0.0, a)
    elif NAME == "silu":
        z = a * _sigmoid(a)
    else:
        tl.static_assert(NAME == "tanh", "an activation that the kernels don't have")
        z = _tanh(a)
    return z


@triton.jit
def times_derivative(dz, a, NAME: tl.constexpr):
    """``dz ⊙ f'(a)`` of ``dz`` and ``a`` in float32, as PyTorch has it: relu's is 0 at 0."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        da = dz * (_normal_below(a) + a * density)
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (a + 0.044715 * a * a * a)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * a * a)
        da = dz * (0.5 * (1.0 + _tanh(inner)) + 0.5 * a * _tanh_slope(inner) * slope)
    elif NAME == "relu":
        da = tl.where(a <= 0.0, 0.0, dz)
    elif NAME == "silu":
        s = _sigmoid(a)
        da = dz * (s * (1.0 + a * (1.0 - s)))
    else:
        tl.static_assert(NAME == "tanh", "an activation that the kernels don't have")
        da = dz * _tanh_slope(a)
    return da

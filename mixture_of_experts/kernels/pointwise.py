# type: ignore  (Triton's language, which type checkers take for Python)
"""Expert activations and their gradients, as Triton functions of float32 blocks.

Arguments: h (pre-activations), u (pre-activations from the second weight of gated experts), g (gradient of the hidden
layer).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_activation(h, ACTIVATION: tl.constexpr):
    """Return act(h)."""
    if ACTIVATION == "gelu":
        value = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 equals sigmoid(2 z)
        value = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "silu":
        value = h * tl.sigmoid(h)
    elif ACTIVATION == "relu":
        value = tl.where(h < 0.0, 0.0, h)  # propagates NaN, as torch does
    elif ACTIVATION == "relu_squared":
        value = tl.where(h < 0.0, 0.0, h)
        value = value * value
    else:
        tl.static_assert(ACTIVATION == "identity")
        value = h
    return value


@triton.jit
def activation_grad(h, ACTIVATION: tl.constexpr):
    """Return act'(h). The result matches torch at kinks and for NaN."""
    if ACTIVATION == "gelu":
        value = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        value = s + h * s * (1.0 - s) * (1.5957691216057308 + 0.21406859364 * h * h)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        value = s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "relu":
        value = tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        value = tl.where(h <= 0.0, 0.0, 2.0 * h)
    else:
        tl.static_assert(ACTIVATION == "identity")
        value = tl.full(h.shape, 1.0, tl.float32)
    return value


@triton.jit
def apply_gated_activation(h, u, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return the hidden layer of gated experts."""
    if ACTIVATION == "clamped_swiglu":
        h = tl.where(h > LIMIT, LIMIT, h)
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
        value = (u + 1.0) * h * tl.sigmoid(ALPHA * h)
    else:
        value = apply_activation(h, ACTIVATION) * u
    return value


@triton.jit
def gated_activation_grads(h, u, g, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return the gradients of h and u."""
    if ACTIVATION == "clamped_swiglu":
        inner_h, inner_u = h <= LIMIT, (u <= LIMIT) & (u >= -LIMIT)
        h = tl.where(h > LIMIT, LIMIT, h)
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
        s = tl.sigmoid(ALPHA * h)
        grad_h = tl.where(inner_h, g * (u + 1.0) * s * (1.0 + ALPHA * h * (1.0 - s)), 0.0)
        grad_u = tl.where(inner_u, g * h * s, 0.0)
    else:
        grad_h = g * u * activation_grad(h, ACTIVATION)
        grad_u = g * apply_activation(h, ACTIVATION)
    return grad_h, grad_u

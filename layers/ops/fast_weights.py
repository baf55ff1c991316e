"""What test-time memories are made of: networks, biases (by their slopes), retentions and steps; pure, on one head.

A network is a function (lin, x [C, K], outer) -> [C, V]: `lin(name, x)` multiplies by its matrix `name`. `sizes` of a
network gives the shapes of its matrices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.precision import HIGHEST

EPS = 1e-6
# Of the variance that a layer norm divides by. Weights may fade to nothing, and what a step moves grows as one over the
# variance: an EPS of 1e-6 would let the first step after that be a million times too long. Answers start near 1.
LEAST = 1e-2
Lin = Callable[[str, Array], Array]  # (name, x [C, inputs]) -> [C, outputs]: the only way to touch the weights
Outer = dict[str, Array]  # scale and shift [V], of the layer norm


def layer_norm(x: Array) -> Array:
    """Zero mean and unit variance over the last axis; large numbers are made small first, so that no square is inf."""
    x = x - jnp.mean(x, -1, keepdims=True)
    large = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), 1.0))
    x = x / large
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + LEAST / jnp.square(large))


def mlp(depth: int, bias: bool, lin: Lin, x: Array, outer: Outer) -> Array:
    """`depth` matrices with GELU between; one is a linear memory. bias: each sees a constant 1 besides."""
    y = x
    for i in range(depth):
        y = jax.nn.gelu(y) if i else y
        y = lin(f"w{i}", jnp.concatenate([y, jnp.ones_like(y[:, :1])], 1) if bias else y)
    return _close(y, x, outer)


def swiglu(lin: Lin, x: Array, outer: Outer) -> Array:
    """(silu(x W_gate) ∘ x W_up) W_down: LaCT (arXiv 2505.23884) and Atlas++."""
    return _close(lin("down", jax.nn.silu(lin("gate", x)) * lin("up", x)), x, outer)


def _close(y: Array, x: Array, outer: Outer) -> Array:
    """x + LN(y), where the memory has a norm: without it Titans' and TTT's memories are hard to train."""
    return x + layer_norm(y) * outer["scale"][None] + outer["shift"][None] if outer else y


def sizes(network: str, K: int, V: int, F: int, depth: int = 2, bias: bool = False) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix."""
    if network == "swiglu":
        return {"gate": (K, F), "up": (K, F), "down": (F, V)}
    widths = [K] + [F] * (depth - 1) + [V]
    return {f"w{i}": (a + bias, b) for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))}


def network(name: str, depth: int = 2, bias: bool = False) -> Callable[[Lin, Array, Outer], Array]:
    return swiglu if name == "swiglu" else functools.partial(mlp, depth, bias)


# The attentional bias, by its gradient at the answer y; threshold [C, 1].


def l2(y: Array, v: Array, threshold: Array | None = None) -> Array:
    """Of |y - v|² / 2."""
    return y - v


def dot(y: Array, v: Array, threshold: Array | None = None) -> Array:
    """Of -<y, v>: Hebbian, linear attention's."""
    return -v


def huber_norm(y: Array, v: Array, threshold: Array) -> Array:
    """Miras, equation 15: the l2 slope, no longer than the threshold."""
    r = y - v
    size = jnp.sqrt(jnp.sum(jnp.square(r), -1, keepdims=True) + EPS**2)
    return r * jnp.minimum(1.0, threshold / size)


def huber_coord(y: Array, v: Array, threshold: Array) -> Array:
    """Each coordinate of the l2 slope, no larger than the threshold."""
    return jnp.clip(y - v, -threshold, threshold)


def huber_mix(y: Array, v: Array, threshold: Array) -> Array:
    """Miras, equation 26: l2 where the error is within the threshold, else threshold times l1; it jumps there."""
    r = y - v
    near = jnp.sum(jnp.square(r), -1, keepdims=True) <= jnp.square(threshold)
    return jnp.where(near, r, threshold * jnp.tanh(10 * r))


def lp(p: float, y: Array, v: Array, threshold: Array | None = None, largest: float | None = None) -> Array:
    """Of sum |y - v|^p, with a smooth sign and modulus (Miras, remark 5).

    largest: beyond p = 2 the loss curves the more the larger the error is, and no step is short enough for all errors.
    Where a token's largest error exceeds this, its slope is shortened so as to grow no faster than the error.
    """
    r = y - v
    slope = p * jnp.tanh(10 * r) * (jnp.square(r) + EPS) ** ((p - 1) / 2)
    if largest is None or p <= 2:
        return slope
    # Not jnp.max: its slope asks which entries equal the maximum, and where a compiler computes them anew, with another
    # last digit, none does: 0 / 0.
    at = jax.nn.one_hot(jnp.argmax(jnp.abs(r), -1), r.shape[-1], dtype=r.dtype)
    return slope * jnp.maximum(jnp.sum(at * jnp.abs(r), -1, keepdims=True) / largest, 1.0) ** (2 - p)


# Retention, by the map from the dual weights A [inputs, outputs], whose recurrence is linear, to the weights in use.


def kl(scale: float, A: Array) -> Array:
    """Memora: each output's weights are `scale` times a distribution over the inputs."""
    return scale * jax.nn.softmax(A, 0)


def bounded(scale: float, A: Array) -> Array:
    """Bregman-sigmoid: weights in (0, scale)."""
    return scale * jax.nn.sigmoid(A)


def lq_printed(q: float, A: Array) -> Array:
    """Moneta as printed (Miras, equation 24): A / |A|_q^(q-2), of degree 3 - q; A must not start at zero."""
    most = _most(A, 1.0)  # nearer to zero the map grows without end, and the EPS of the norm holds it
    return A / _norm(A / most, q) ** (q - 2) / most ** (q - 2)


def lq_mirror(q: float, A: Array) -> Array:
    """The mirror map that the printed one is derived from: the gradient of |A|_q² / 2, of degree 1."""
    most = _most(A, EPS)
    part = A / most
    return most * jnp.sign(A) * jnp.abs(part) ** (q - 1) / _norm(part, q) ** (q - 2)


def _most(A: Array, least: float) -> Array:
    """The largest entry, or `least`. A map does not depend on what it scales by, but powers must not overflow."""
    return jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(A))), least)


def _norm(A: Array, q: float) -> Array:
    return (jnp.sum((jnp.square(A) + EPS**2) ** (q / 2)) + EPS) ** (1 / q)


def elastic(width: float, A: Array) -> Array:
    """Elastic net as follow-the-regularised-leader: what is smaller than `width` counts as zero."""
    return jnp.sign(A) * jax.nn.relu(jnp.abs(A) - width)


# Steps.


def newton_schulz(S: Array, steps: int = 5) -> Array:
    """About the nearest matrix with orthogonal rows or columns (Muon's quintic iteration; Atlas, arXiv 2505.23735)."""
    X = S / jnp.sqrt(jnp.sum(jnp.square(S)) + EPS**2)  # S is zero where nothing was to be learned
    turned = X.shape[0] > X.shape[1]
    X = X.T if turned else X
    for _ in range(steps):
        square = jnp.matmul(X, X.T, precision=HIGHEST)
        poly = -4.7750 * square + 2.0315 * jnp.matmul(square, square, precision=HIGHEST)
        X = 3.4445 * X + jnp.matmul(poly, X, precision=HIGHEST)
    return X.T if turned else X

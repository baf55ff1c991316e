"""Normalisations. Statistics are taken in float32 (float64 for float64 inputs); the dtype of the input comes back."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.ops.precision import wide


def rms_norm(x: Array, eps: float = 1e-6) -> Array:
    """x / sqrt(mean(x²) + eps) over the last axis, in at least float32 (a weight usually follows)."""
    x = x.astype(wide(x))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)


def l2_norm(x: Array, eps: float = 1e-6) -> Array:
    """x / sqrt(sum(x²) + eps) over the last axis, in the dtype of x: unit vectors, and 0 stays 0."""
    y = x.astype(wide(x))
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    `axes` is the letter of that axis: "D" on the residual stream, "K" or "V" per head (the weight shared by the heads).
    parts: the axis is so many vectors side by side, each normed by itself (residual streams).
    Given a gate, the norm is multiplied by activation(gate): the norm comes first (RetNet, GLA, Gated DeltaNet, KDA).
    """

    def __init__(
        self,
        D: int,
        *,
        axes: str = "D",
        eps: float = 1e-6,
        parts: int = 1,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ):
        self.eps, self.parts, self.activation = eps, parts, activation
        self.w = nnx.Param(jnp.ones([D], jnp.float32), axes=axes, decay=False)

    def __call__(self, x: Array, gate: Array | None = None) -> Array:
        if self.parts == 1:
            y = rms_norm(x, self.eps)
        else:
            y = rms_norm(x.reshape(*x.shape[:-1], self.parts, -1), self.eps).reshape(x.shape)
        y = y * self.w[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if gate is not None:
            y = y * self.activation(gate.astype(y.dtype))
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation with a learned scale and shift over all axes named (Ba et al. 2016, arXiv 1607.06450).

    `LayerNorm("HV", H=4, V=16)` norms the last two axes of [B, T, H, V] as one.
    """

    def __init__(self, axes: str, *, eps: float = 1e-6, **sizes: int):
        shape = [sizes[a] for a in axes]
        self.eps, self.over = eps, tuple(range(-len(axes), 0))
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=axes, decay=False)
        self.shift = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, decay=False)

    def __call__(self, x: Array) -> Array:
        y = x.astype(wide(x))
        y = y - jnp.mean(y, self.over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), self.over, keepdims=True) + self.eps)
        scale, shift = (
            p[...].astype(y.dtype).reshape((1,) * (y.ndim - p.ndim) + p.shape) for p in (self.scale, self.shift)
        )
        return (y * scale + shift).astype(x.dtype)

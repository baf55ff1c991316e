"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half convention.

Channel k < K/2 and channel k + K/2 are the two coordinates of a point, turned by the angle pos · theta^(-2k/K).
"""

import jax.numpy as jnp
from jax import Array

from layers.ops.precision import wide


def rope(x_BTHK: Array, pos_BT: Array, theta: float = 10_000.0) -> Array:
    """Turns queries or keys by their place in the document; same shape and dtype as `x_BTHK`, K even.

    Angles and products are float32 (float64 for float64 x). A negative place, which marks padding, counts as 0.
    """
    K = x_BTHK.shape[-1]
    if K % 2:
        raise ValueError(f"rope turns pairs of channels: K is {K}, it must be even")
    dtype = wide(x_BTHK)
    speed_K = theta ** (jnp.arange(0, K, 2, dtype=dtype) * (-1.0 / K))
    angle_BTK = jnp.maximum(pos_BT, 0).astype(dtype)[:, :, None] * speed_K[None, None, :]
    cos, sin = jnp.cos(angle_BTK)[:, :, None, :], jnp.sin(angle_BTK)[:, :, None, :]
    first, second = jnp.split(x_BTHK.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHK.dtype)

"""The forget gate of Mamba-2 (arXiv 2405.21060), shared by Gated DeltaNet and, per key channel, by KDA."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.ops.precision import wide


class MambaDecay(nnx.Module):
    """step = softplus(a + dt_bias),  log_decay = -exp(A_log) · step; bounded: bound · σ(exp(A_log) · (a + dt_bias)).

    `axes` is "H" (one decay a head) or "HK" (one a key channel); A_log has one entry a head. At init softplus(dt_bias)
    is exp(U(log 1e-3, log 0.1)) and exp(A_log) is U(A) (1 with a bound): the heads begin with very different spans.
    """

    def __init__(
        self,
        axes: str,
        *,
        rngs: nnx.Rngs,
        A: tuple[float, float] = (1.0, 16.0),
        bound: float | None = None,
        **sizes: int,
    ):
        self.bound = bound
        H = sizes["H"]
        scale = jnp.ones([H], jnp.float32)
        if bound is None:
            scale = jax.random.uniform(rngs.params(), [H], jnp.float32, *A)
        shape = [sizes[a] for a in axes]
        log_step = jax.random.uniform(rngs.params(), shape, jnp.float32, math.log(1e-3), math.log(0.1))
        step = jnp.exp(log_step)
        self.A_log = nnx.Param(jnp.log(scale), axes="H", decay=False)
        self.dt_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)), axes=axes, decay=False)  # softplus^-1(step)

    def __call__(self, a: Array) -> tuple[Array, Array]:
        """a: [B, T, H] or [B, T, H, K]. Returns (log_decay, step) of that shape, in at least float32."""
        dtype = wide(a)
        a = a.astype(dtype) + self.dt_bias[...].astype(dtype)[None, None]
        scale = jnp.exp(self.A_log[...].astype(dtype)).reshape((1, 1, -1) + (1,) * (a.ndim - 3))
        step = jax.nn.softplus(a)
        return -scale * step if self.bound is None else self.bound * jax.nn.sigmoid(scale * a), step

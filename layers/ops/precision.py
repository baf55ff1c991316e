"""What numbers are computed in."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST  # float32 products in float32: accelerators would take bf16 or TF32 by default


def wide(*arrays: jax.Array) -> jnp.dtype:
    """float64 if any of the arrays is, else float32: for states, gates, sums, solves and statistics."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)

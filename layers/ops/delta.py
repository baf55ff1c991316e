"""The delta rule with optional decay.

    S_t = (I - beta_t k_t k_t^T) exp(log_decay_t) S_{t-1} + beta_t k_t v_t^T ;  y_t = q_t S_t

Serves DeltaNet (no decay: arXiv 2406.06484), Gated DeltaNet (one a head: 2412.06464) and KDA (one a key channel:
2510.26692). With unit keys, beta in (0, 1) erases and beta in (1, 2) gives the transition a negative eigenvalue.
"""

from jax import Array

from layers.ops.precision import wide
from layers.ops.recurrence import Implementation, recurrence


def delta_recurrence(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    beta_BTH: Array,
    log_decay: Array | None = None,
    *,
    state: Array | None = None,
    pos: Array | None = None,
    chunk: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """Returns (y_BTHV in the dtype of v, state_BHKV in float32, or float64 for float64 inputs).

    beta: [B, T, H], the step of the rule. Keys are used as they come: normalise them before. The other arguments are
    those of layers.ops.linear.linear_recurrence.
    """
    dtype = wide(v_BTHV)  # beta is a gate: never rounded to the dtype of v
    beta = beta_BTH[..., None].astype(dtype)
    y, state = recurrence(
        q_BTHK,
        k_BTHK,
        beta * v_BTHV.astype(dtype),
        beta * k_BTHK.astype(dtype),
        log_decay,
        state=state,
        pos=pos,
        chunk=chunk,
        implementation=implementation,
    )
    return y.astype(v_BTHV.dtype), state

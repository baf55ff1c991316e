"""Linear attention with optional decay: S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T,  y_t = q_t S_t.

Serves linear attention (no decay), RetNet and SSD (one decay a head) and GLA (one a key channel: arXiv 2312.06635).
"""

from jax import Array

from layers.ops.recurrence import Implementation, recurrence


def linear_recurrence(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    log_decay: Array | None = None,
    *,
    state: Array | None = None,
    pos: Array | None = None,
    chunk: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """Returns (y_BTHV in the dtype of v, state_BHKV in float32, or float64 for float64 inputs).

    log_decay: None, [B, T, H] or [B, T, H, K], at most 0. state: [B, H, K, V] or None for zeros. pos: int [B, T], place
    within the document: at 0 the state is forgotten first, below 0 is padding; None for one document that goes on.
    The query is not scaled. implementation: see layers.ops.recurrence.
    """
    return recurrence(
        q_BTHK, k_BTHK, v_BTHV, None, log_decay, state=state, pos=pos, chunk=chunk, implementation=implementation
    )

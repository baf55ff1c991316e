"""Causal softmax attention: y_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys that t may see.

One rule says who sees whom, for documents, windows, padding, empty slots and rings alike: every key has a time, every
query a span of times, and key s is visible to query t iff

    earliest_t <= key_time_s <= query_time_t        earliest_t = max(since_t, query_time_t - window + 1, 0)

Three schedules of the same sum. "naive" is the definition, with all T·S scores at once. "blocks" keeps T·block of them:
an online softmax over blocks of keys (Milakov & Gimelshein 2018, arXiv 1805.02867) whose backward pass recomputes the
weights from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135); which blocks of keys meet which blocks of queries
follows from the times, so that what no query of a block may see costs nothing. "cudnn" calls NVIDIA's kernel, with a
mask of T·S where times are given.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from layers.ops.place import MODEL, SEQUENCE, sizes
from layers.ops.precision import wide
from layers.ops.sequence import by_pieces, in_pieces

NEVER = jnp.iinfo(jnp.int32).max
MASK = 2**29  # entries of a mask (two bytes each, and as many for a slope that nobody reads) that cuDNN may be given


def attention(
    q_BTHK: Array,
    k_BSGK: Array,
    v_BSGV: Array,
    *,
    scale: float | None = None,
    query_time: Array | None = None,
    key_time: Array | None = None,
    since: Array | None = None,
    window: int | None = None,
    head_major: bool = False,
    ordered: bool = False,
    always: tuple[Array, Array, Array] | None = None,
    block: int | None = None,
    implementation: str = "auto",
) -> Array:
    """y_BTHV in the dtype of q: each query's average of the values that it may see, and 0 where it sees none.

    q_BTHK, k_BSGK, v_BSGV: floating, mixed dtypes are promoted. Head h reads group h // (H / G).
    scale: multiplies the scores; None = K**-0.5.
    query_time [B,T], key_time [B,S]: int32, in any order; a negative one marks padding or an empty slot, which sees
        nothing and is never seen. Both None: self-attention (S = T) at times 0..T-1.
    since [B,T]: int32, the earliest time that a query may see (where its document began); None = 0.
    window: a query sees the keys of its own and the window - 1 times before; None = all.
    always: (queries [B,T,H,K], keys [B,P,G,K], values [B,P,G,V]) of P more keys, which every query sees whatever the
        times, under the same softmax, and meets with queries of their own.
    ordered: the times of queries and of keys (S = T) are the same and rise from left to right, padding aside, so that a
        kernel may leave out the keys to the right of a query.
    head_major: keys and values come as [B,G,S,K] and [B,G,S,V], the layout in which caches are read at full speed.
    block: queries and keys in a block of "blocks"; None = 128 on CPU (scores stay in the core's cache), else 512.
    implementation: "naive" | "blocks" | "cudnn" | "auto". cudnn knows no times but ordered ones, and no `always`, and
        asks for a GPU, bfloat16 or float16, and V = K; auto takes it where it fits (of a mask no more than a GiB), else
        naive where scores are few, else blocks.

    Statistics and sums are float32 (float64 for float64 inputs). "blocks" is differentiable once, in reverse.
    Raises ValueError for sizes that do not agree, times given by half, an unknown or unfit implementation.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3] if not head_major else k_BSGK.shape[2:0:-1]
    V = v_BSGV.shape[-1]
    wanted = (B, G, S) if head_major else (B, S, G)
    if k_BSGK.shape != (*wanted, K) or v_BSGV.shape != (*wanted, V):
        raise ValueError(f"attention: queries {q_BTHK.shape}, keys {k_BSGK.shape}, values {v_BSGV.shape} do not agree")
    if H % G:
        raise ValueError(f"attention: {H} heads do not divide into {G} groups of keys")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}: it must be at least 1")
    if (query_time is None) != (key_time is None) or (query_time is None and since is not None):
        raise ValueError("attention: query_time and key_time come together, and since only with them")
    if query_time is None and S != T:
        raise ValueError(f"attention: {T} queries and {S} keys need query_time and key_time")
    if ordered and S != T:
        raise ValueError(f"attention: {T} queries and {S} keys are not the same tokens, as `ordered` says")
    plain = query_time is None
    if in_pieces(T) and S == T and not head_major:
        if query_time is None or key_time is None:
            query_time = key_time = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        settings = {"scale": scale, "window": window, "block": block, "implementation": implementation}
        return _in_pieces(q_BTHK, k_BSGK, v_BSGV, query_time, key_time, since, always, settings)
    if implementation == "auto":
        known = plain or (ordered and B * T * S <= MASK)
        implementation = _choose(q_BTHK, k_BSGK, v_BSGV, T, S, known and always is None)

    dtype = q_BTHK.dtype if q_BTHK.dtype == k_BSGK.dtype == v_BSGV.dtype else wide(q_BTHK, k_BSGK, v_BSGV)
    q, k, v = (a.astype(dtype) for a in (q_BTHK, k_BSGK, v_BSGV))
    scale = K**-0.5 if scale is None else scale
    if implementation == "cudnn" and (not (plain or ordered) or K != V or always is not None):
        raise ValueError("attention: cudnn knows no times out of order, V unlike K, or `always`; use 'blocks'")
    if (implementation == "cudnn") == head_major:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if query_time is None or key_time is None:
        query_time = key_time = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    earliest = jnp.zeros((B, T), jnp.int32) if since is None else jnp.maximum(since, 0)
    if window is not None:
        earliest = jnp.maximum(earliest, query_time - (window - 1))
    if implementation == "cudnn":
        kernel = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn")
        if plain:
            local = None if window is None else (window - 1, 0)
            return kernel(q, k, v, local_window_size=local).astype(q_BTHK.dtype)
        # The kernel's own window would count padding, too.
        visible_BTS = _visible(query_time, earliest, key_time)
        y_BTHV = kernel(q, k, v, mask=visible_BTS[:, None])
        return jnp.where(visible_BTS.any(-1)[..., None, None], y_BTHV, 0).astype(q_BTHK.dtype)
    if implementation == "naive":
        y_BTHV, mass_BTH = _naive(q, k, v, query_time, earliest, key_time, scale)
    elif implementation == "blocks":
        if block is None:
            block = 128 if jax.default_backend() == "cpu" else 512
        y_BTHV, mass_BTH = _in_blocks(q, k, v, query_time, earliest, key_time, scale, block)
    else:
        raise ValueError(f"attention: implementation is {implementation!r}, not naive, blocks, cudnn or auto")
    if always is not None:
        free, k, v = (a.astype(dtype) for a in always)
        now, then = (jnp.zeros((B, n), jnp.int32) for n in (T, k.shape[1]))
        more_BTHV, more_BTH = _naive(free, k.swapaxes(1, 2), v.swapaxes(1, 2), now, now, then, scale)
        share_BTH1 = jax.nn.sigmoid(mass_BTH - more_BTH)[..., None]
        y_BTHV, more_BTHV = y_BTHV.astype(share_BTH1.dtype), more_BTHV.astype(share_BTH1.dtype)
        y_BTHV = y_BTHV * share_BTH1 + more_BTHV * (1 - share_BTH1)
    return y_BTHV.astype(q_BTHK.dtype)


def _in_pieces(
    q: Array, k: Array, v: Array, query_time: Array, key_time: Array, since: Array | None, always: Any, settings: Any
) -> Array:
    """Tokens over devices: keys and values are sent, of a window those before a piece that it may reach into."""
    window = settings["window"]

    def piece(q, k, v, query_time, key_time, since=None, free=None, known=None, told=None):
        T, others = q.shape[1], jax.lax.axis_size(SEQUENCE) - 1
        more = None if free is None else (free, known, told)

        def attend(k: Array, v: Array, key_time: Array) -> Array:
            times = {"query_time": query_time, "key_time": key_time, "since": since}
            return attention(q, k, v, always=more, **times, **settings)

        def among_all(*own: Array) -> Array:
            return attend(*(lax.all_gather(a, SEQUENCE, axis=1, tiled=True) for a in own))

        if window is None or window - 1 > (others - 1) * T:
            return (among_all(k, v, key_time),)
        near = tuple(_before(a, window - 1) for a in (k, v, key_time + 1))
        near = near[0], near[1], near[2] - 1  # before the first piece there are zeros: keys of time -1, that is none
        seen = [jnp.concatenate([a, b], 1) for a, b in zip(near, (k, v, key_time), strict=True)]
        # A document that goes on behind padding may reach further back than a window of tokens.
        earliest = query_time - (window - 1) if since is None else jnp.maximum(query_time - (window - 1), since)
        wanted_B = jnp.min(jnp.where(query_time >= 0, jnp.maximum(earliest, 0), NEVER), 1)
        known_B = jnp.min(jnp.where(seen[2] >= 0, seen[2], NEVER), 1)
        further = lax.psum(jnp.any(wanted_B < known_B).astype(jnp.int32), SEQUENCE) > 0
        # Of the other branch the backward pass keeps what this device has, and nothing that was sent.
        everything = jax.checkpoint(among_all)
        return (lax.cond(further, lambda own, _: everything(*own), lambda _, b: attend(*b), (k, v, key_time), seen),)

    split = sizes().get(MODEL, 1)
    H, G = "HG" if q.shape[2] % split == 0 and k.shape[2] % split == 0 else "  "
    arguments = {
        "q": ("BT" + H, q), "k": ("BT" + G, k), "v": ("BT" + G, v),
        "query_time": ("BT", query_time), "key_time": ("BT", key_time), "since": ("BT", since),
    }  # fmt: skip
    if always is not None:
        free, known, told = always
        arguments |= {"free": ("BT" + H, free), "known": ("B " + G, known), "told": ("B " + G, told)}
    shape = (*q.shape[:3], v.shape[-1])
    return by_pieces(piece, arguments, [("BT" + H, shape)])[0]


def _before(a: Array, count: int) -> Array:
    """The `count` tokens before this device's, of those that lie on others; zeros where there are none."""
    N, T = jax.lax.axis_size(SEQUENCE), a.shape[1]
    parts = []
    for back in range(-(-count // T), 0, -1):
        part = a[:, max(T * back - count, 0) :]  # of the furthest piece no more than is wanted
        parts.append(lax.ppermute(part, SEQUENCE, [(i, i + back) for i in range(N - back)]))
    return jnp.concatenate(parts, 1) if parts else a[:, :0]


def _choose(q_BTHK: Array, k: Array, v: Array, T: int, S: int, known: bool) -> str:
    K = q_BTHK.shape[-1]
    half = all(a.dtype == q_BTHK.dtype and a.dtype in (jnp.bfloat16, jnp.float16) for a in (q_BTHK, k, v))
    fits = known and half and v.shape[-1] == K and K % 8 == 0 and K <= 128 and T % 64 == 0
    if fits and jax.default_backend() == "gpu":
        return "cudnn"
    return "naive" if T == 1 or T * S < 256 * 256 else "blocks"


def _visible(latest_BT: Array, earliest_BT: Array, key_time_BS: Array) -> Array:
    """Which keys a query sees: the rule of this module, bool [B,T,S]."""
    time_B1S = key_time_BS[:, None, :]
    return (earliest_BT[:, :, None] <= time_B1S) & (time_B1S <= latest_BT[:, :, None])


def _naive(
    q_BTHK: Array,
    k_BGSK: Array,
    v_BGSV: Array,
    latest_BT: Array,
    earliest_BT: Array,
    key_time_BS: Array,
    scale: float,
) -> tuple[Array, Array]:
    """y_BTHV, and mass_BTH: the log of the sum of exp(score), the lowest finite number where nothing is seen."""
    (B, T, H, _), (G, S) = q_BTHK.shape, k_BGSK.shape[1:3]
    kind = wide(q_BTHK)
    # The queries of a group as rows of one matrix: a form of product for which no backend turns a cache around.
    q_BGRK = rearrange(q_BTHK, "b t (g h) k -> b g (h t) k", g=G)
    s_BGRS = jnp.einsum("bgrk,bgsk->bgrs", q_BGRK, k_BGSK, preferred_element_type=kind) * scale
    visible_BTS = _visible(latest_BT, earliest_BT, key_time_BS)
    s_BHTS = jnp.where(visible_BTS[:, None], s_BGRS.reshape(B, H, T, S), -jnp.inf)
    # A finite maximum keeps exp(-inf - max) at 0, with a zero gradient, where nothing is visible.
    top_BHT1 = lax.stop_gradient(jnp.maximum(s_BHTS.max(-1, keepdims=True), jnp.finfo(kind).min))
    p_BHTS = jnp.exp(s_BHTS - top_BHT1)
    p_BGRS = p_BHTS.reshape(s_BGRS.shape)
    total_BGR1 = p_BGRS.sum(-1, keepdims=True)
    y_BGRV = jnp.einsum("bgrs,bgsv->bgrv", p_BGRS.astype(v_BGSV.dtype), v_BGSV, preferred_element_type=kind)
    total_BGR1 = jnp.where(total_BGR1 > 0, total_BGR1, 1)
    mass_BTH = (top_BHT1 + jnp.log(total_BGR1.reshape(top_BHT1.shape)))[..., 0].swapaxes(1, 2)
    return rearrange(y_BGRV / total_BGR1, "b g (h t) v -> b t (g h) v", t=T), mass_BTH


# Blocks. N blocks of queries, each with R rows (its queries times the heads of a group); J blocks of C keys. A lane is
# one group of one sequence; all lanes take the same steps, so that a step is a batch of matrix products that splits
# over devices as B and G do.


class _Times(NamedTuple):
    """When each row and key is, and which blocks therefore meet."""

    latest_BNR: Array
    earliest_BNR: Array
    key_time_BJC: Array
    keys_N2: Array  # blocks of keys [from, to) that block n of queries meets
    queries_J2: Array  # blocks of queries [from, to) that block j of keys meets


def _in_blocks(
    q_BTHK: Array,
    k_BGSK: Array,
    v_BGSV: Array,
    latest_BT: Array,
    earliest_BT: Array,
    key_time_BS: Array,
    scale: float,
    block: int,
) -> tuple[Array, Array]:
    (T, H), (G, S) = q_BTHK.shape[1:3], k_BGSK.shape[1:3]
    Q, C = _even(T, block), _even(S, block)
    q_BGNRK = rearrange(_pad(q_BTHK, 1, Q), "b (n q) (g h) k -> b g n (h q) k", q=Q, g=G)
    k_BGJCK, v_BGJCV = (rearrange(_pad(a, 2, C), "b g (j c) k -> b g j c k", c=C) for a in (k_BGSK, v_BGSV))

    def rows(time_BT: Array, fill: int) -> Array:
        time_BNQ = rearrange(_pad(time_BT, 1, Q, fill), "b (n q) -> b n q", q=Q)
        return jnp.tile(time_BNQ, (1, 1, H // G))

    latest_BNR, earliest_BNR = rows(latest_BT, -1), rows(earliest_BT, 0)
    key_time_BJC = rearrange(_pad(key_time_BS, 1, C, -1), "b (j c) -> b j c", c=C)
    meet_NJ = _meet(latest_BNR, earliest_BNR, key_time_BJC)
    times = _Times(latest_BNR, earliest_BNR, key_time_BJC, _span(meet_NJ), _span(meet_NJ.T))
    y_BGNRV, mass_BGNR = _flash(q_BGNRK, k_BGJCK, v_BGJCV, times, scale)
    mass_BTH = rearrange(mass_BGNR, "b g n (h q) -> b (n q) (g h)", q=Q)[:, :T]
    return rearrange(y_BGNRV, "b g n (h q) v -> b (n q) (g h) v", q=Q)[:, :T], mass_BTH


def _even(length: int, block: int) -> int:
    """Size of a block when `length` is split evenly into as few as blocks of about `block` allow."""
    return -(-length // (8 * -(-length // block))) * 8


def _pad(a: Array, axis: int, multiple: int, fill: int = 0) -> Array:
    short = -a.shape[axis] % multiple
    widths = [(0, short if i == axis else 0) for i in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=fill) if short else a


def _meet(latest_BNR: Array, earliest_BNR: Array, key_time_BJC: Array) -> Array:
    """Whether any query of block n may see a key of block j, in any sequence: the overlap of their spans of time."""
    sees = latest_BNR >= earliest_BNR
    first_BN1 = jnp.where(sees, earliest_BNR, NEVER).min(-1)[:, :, None]
    last_BN1 = jnp.where(sees, latest_BNR, -1).max(-1)[:, :, None]
    oldest_B1J = jnp.where(key_time_BJC >= 0, key_time_BJC, NEVER).min(-1)[:, None, :]
    newest_B1J = key_time_BJC.max(-1)[:, None, :]
    return ((oldest_B1J <= last_BN1) & (newest_B1J >= first_BN1)).any(0)


def _span(meet_NJ: Array) -> Array:
    """[from, to) of the blocks that each row meets; empty where it meets none."""
    J = meet_NJ.shape[1]
    j_1J = jnp.arange(J, dtype=jnp.int32)[None, :]
    return jnp.stack([jnp.where(meet_NJ, j_1J, J).min(1), jnp.where(meet_NJ, j_1J + 1, 0).max(1)], axis=1)


def _over_lanes(lane: Callable[..., Any]) -> Callable[..., Any]:
    """`lane(times, *arrays)` over B and G: the arrays have both axes, the times B, and which blocks meet neither."""

    def over_B(latest: Array, earliest: Array, key_time: Array, meets: tuple[Array, Array], *arrays: Array):
        times = _Times(latest, earliest, key_time, *meets)
        return jax.vmap(lambda *arrays: lane(times, *arrays))(*arrays)

    def over(times: _Times, *arrays: Array):
        axes = (0, 0, 0, None, *[0] * len(arrays))
        return jax.vmap(over_B, in_axes=axes)(*times[:3], times[3:], *arrays)

    return over


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BGNRK: Array, k_BGJCK: Array, v_BGJCV: Array, times: _Times, scale: float) -> tuple[Array, Array]:
    return _flash_forward(q_BGNRK, k_BGJCK, v_BGJCV, times, scale)[0]


def _flash_forward(q_BGNRK: Array, k_BGJCK: Array, v_BGJCV: Array, times: _Times, scale: float):
    lane = functools.partial(_lane_forward, scale=scale)
    y_BGNRV, lse_BGNR = _over_lanes(lane)(times, q_BGNRK, k_BGJCK, v_BGJCV)
    return (y_BGNRV, lse_BGNR), (q_BGNRK, k_BGJCK, v_BGJCV, times, y_BGNRV, lse_BGNR)


def _flash_backward(scale: float, kept, slopes: tuple[Array, Array]):
    q_BGNRK, k_BGJCK, v_BGJCV, times, y_BGNRV, lse_BGNR = kept
    dy_BGNRV, dlse_BGNR = slopes
    # sum_s p_ts dp_ts, which the softmax's derivative subtracts, is dy_t . y_t; the slope of the log-sum-exp is p_ts.
    weighed_BGNRV = dy_BGNRV.astype(lse_BGNR.dtype) * y_BGNRV.astype(lse_BGNR.dtype)
    # Summed by a product: on a CPU, XLA is slow at sums that must also turn what they sum around.
    ones_V1 = jnp.ones((y_BGNRV.shape[-1], 1), lse_BGNR.dtype)
    dot_BGNR = jnp.matmul(weighed_BGNRV, ones_V1, precision=lax.Precision.HIGHEST)[..., 0] - dlse_BGNR
    lane = functools.partial(_lane_backward, scale=scale)
    dq, dk, dv = _over_lanes(lane)(times, q_BGNRK, k_BGJCK, v_BGJCV, dy_BGNRV, lse_BGNR, dot_BGNR)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def _lane_forward(times: _Times, q_NRK: Array, k_JCK: Array, v_JCV: Array, *, scale: float) -> tuple[Array, Array]:
    """y_NRV and the log-sum-exp_NR of the scores, one block of queries after the other."""
    kind = wide(q_NRK)
    R, V = q_NRK.shape[1], v_JCV.shape[-1]

    def block(_, n: Array):
        q_RK, latest_R1, earliest_R1 = q_NRK[n], times.latest_BNR[n][:, None], times.earliest_BNR[n][:, None]

        def step(j: Array, carry: tuple[Array, Array, Array]):
            top_R, total_R, sum_RV = carry
            time_1C = times.key_time_BJC[j][None, :]
            s_RC = jnp.einsum("rk,ck->rc", q_RK, k_JCK[j], preferred_element_type=kind) * scale
            s_RC = jnp.where((earliest_R1 <= time_1C) & (time_1C <= latest_R1), s_RC, -jnp.inf)
            higher_R = jnp.maximum(top_R, s_RC.max(1))
            p_RC = jnp.exp(s_RC - higher_R[:, None])
            fade_R = jnp.exp(top_R - higher_R)
            more_RV = jnp.einsum("rc,cv->rv", p_RC.astype(v_JCV.dtype), v_JCV[j], preferred_element_type=kind)
            return higher_R, total_R * fade_R + p_RC.sum(1), sum_RV * fade_R[:, None] + more_RV

        # The lowest finite number, not -inf: where nothing is visible, exp(-inf - top) is 0 and never NaN.
        start = (jnp.full(R, jnp.finfo(kind).min, kind), jnp.zeros(R, kind), jnp.zeros((R, V), kind))
        top_R, total_R, sum_RV = lax.fori_loop(times.keys_N2[n, 0], times.keys_N2[n, 1], step, start)
        total_R = jnp.where(total_R > 0, total_R, 1)
        return None, ((sum_RV / total_R[:, None]).astype(v_JCV.dtype), top_R + jnp.log(total_R))

    _, out = lax.scan(block, None, jnp.arange(q_NRK.shape[0]))
    return out


def _lane_backward(
    times: _Times,
    q_NRK: Array,
    k_JCK: Array,
    v_JCV: Array,
    dy_NRV: Array,
    lse_NR: Array,
    dot_NR: Array,
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients, one block of keys after the other.

    Scores are held keys first, and the gradient of queries time last: so no product turns its left side around.
    """
    kind = lse_NR.dtype

    def block(dq_NKR: Array, j: Array):
        k_CK, v_CV, time_C1 = k_JCK[j], v_JCV[j], times.key_time_BJC[j][:, None]
        k_KC = k_CK.T

        def step(n: Array, carry: tuple[Array, Array, Array]):
            dk_CK, dv_CV, dq_NKR = carry
            q_RK, dy_RV = q_NRK[n], dy_NRV[n]
            latest_1R, earliest_1R = times.latest_BNR[n][None, :], times.earliest_BNR[n][None, :]
            s_CR = jnp.einsum("ck,rk->cr", k_CK, q_RK, preferred_element_type=kind) * scale
            s_CR = jnp.where((earliest_1R <= time_C1) & (time_C1 <= latest_1R), s_CR, -jnp.inf)
            p_CR = jnp.exp(s_CR - lse_NR[n][None, :])
            dp_CR = jnp.einsum("cv,rv->cr", v_CV, dy_RV, preferred_element_type=kind)
            ds_CR = (p_CR * (dp_CR - dot_NR[n][None, :]) * scale).astype(q_RK.dtype)
            dv_CV += jnp.einsum("cr,rv->cv", p_CR.astype(dy_RV.dtype), dy_RV, preferred_element_type=kind)
            dk_CK += jnp.einsum("cr,rk->ck", ds_CR, q_RK, preferred_element_type=kind)
            more_KR = jnp.einsum("kc,cr->kr", k_KC, ds_CR, preferred_element_type=kind)
            return dk_CK, dv_CV, lax.dynamic_update_index_in_dim(dq_NKR, dq_NKR[n] + more_KR, n, 0)

        start = (jnp.zeros(k_CK.shape, kind), jnp.zeros(v_CV.shape, kind), dq_NKR)
        dk_CK, dv_CV, dq_NKR = lax.fori_loop(times.queries_J2[j, 0], times.queries_J2[j, 1], step, start)
        return dq_NKR, (dk_CK.astype(k_CK.dtype), dv_CV.astype(v_CV.dtype))

    start = jnp.zeros(q_NRK.swapaxes(1, 2).shape, kind)
    dq_NKR, (dk_JCK, dv_JCV) = lax.scan(block, start, jnp.arange(k_JCK.shape[0]))
    return dq_NKR.swapaxes(1, 2).astype(q_NRK.dtype), dk_JCK, dv_JCV

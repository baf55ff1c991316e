"""The one recurrence that the linear family shares, as a definition and read in chunks.

    S_t = diag(e^{g_t}) S_{t-1} + k_t (w_t - r_t^T S~)^T        S~ = diag(e^{g_t}) S_{t-1}  (erase="decayed")
                                                                  or S_{t-1}                 (erase="undecayed")
    y_t = S_t^T q_t                                              (read="inclusive")
          (S_{t-1} + diag(u) k_t w_t^T)^T q_t                    (read="exclusive")

g is the log of the decay: absent, one a head, or one a key channel. w is what is written, r the row that reads out what
to erase (None: nothing is erased). Linear attention, RetNet, GLA and SSD have r = None; the delta rules r = beta k,
w = beta v. Layers with several rank-one updates a token are this recurrence run with micro-steps (`micro_steps`).

Within a chunk that starts from S_0, with G the running sum of g and all exponents at most 0:

    L_ij = sum_d r_id k_jd e^{G_id - G_jd}  (j < i)      (I + L) U = W - (R e^{G}) S_0
    A_ij = sum_d q_id k_jd e^{G_id - G_jd}  (j <= i)     Y = (Q e^{G}) S_0 + A U
                                                         S_C = e^{G_C} S_0 + (K e^{G_C - G})^T U

A document's start (pos 0) masks pairs across it and the terms in S_0 behind it. Padding (pos < 0) has k = 0, g = 0.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from layers.ops.chunk_scan import scan_chunks
from layers.ops.pairs import Rows, decayed_products
from layers.ops.precision import HIGHEST, wide
from layers.ops.sequence import by_pieces, hand_on, in_pieces
from layers.ops.triangular import solve_unit_lower, unit_lower_inverse

Implementation = Literal["auto", "naive", "chunked", "scan", "split"]
SHORT = 8  # up to this many tokens the definition itself is the fastest form


class Inputs(NamedTuple):
    """What the recurrence reads; a leaf may be None. Time is axis 1 (B T H .), or axis -2 of a chunk (B H C .)."""

    q: Array
    k: Array
    w: Array
    r: Array | None
    g: Array | None  # [..., K] or, for one decay a head, [..., 1]
    segment: Array | None  # [B, T]: counts document starts; the initial state belongs to segment 0
    fresh: Array | None  # [B, T]: a document starts here
    valid: Array | None  # [B, T]: not padding


class Rule(NamedTuple):
    exclusive: bool
    undecayed: bool
    bonus: Array | None  # [H, K]
    operand: jnp.dtype | None  # matrix operands are rounded to this dtype (accelerators, bf16 inputs)


def recurrence(
    q_BTHK: Array,
    k_BTHK: Array,
    w_BTHV: Array,
    r_BTHK: Array | None = None,
    log_decay: Array | None = None,
    *,
    state: Array | None = None,
    pos: Array | None = None,
    chunk: int = 64,
    read: Literal["inclusive", "exclusive"] = "inclusive",
    erase: Literal["decayed", "undecayed"] = "decayed",
    bonus_HK: Array | None = None,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """Returns (y_BTHV in the dtype of w, final state_BHKV in float32, or float64 for float64 inputs).

    log_decay: None, [B, T, H] or [B, T, H, K], at most 0. state: [B, H, K, V], None for zeros. pos: int [B, T] as in
    layers.layer.Tokens, None for one document that goes on. The query is not scaled. chunk: tokens read at once, at
    most; it changes no more than rounding.
    implementation: "naive" runs the definition token by token; "chunked" takes the schedule that suits the backend:
    "scan" (everything inside one scan over chunks with a checkpointed body: CPU) or "split" (all chunks at once, only
    the state in the scan: GPU, TPU); "auto" is chunked but for short pieces. All agree but for rounding.
    """
    B, T, H, K = q_BTHK.shape
    if k_BTHK.shape != q_BTHK.shape or w_BTHV.shape[:3] != (B, T, H):
        raise ValueError(f"query {q_BTHK.shape}, key {k_BTHK.shape} and value {w_BTHV.shape} do not agree")
    if log_decay is not None and log_decay.shape not in ((B, T, H), (B, T, H, K)):
        raise ValueError(f"log_decay is {log_decay.shape}: it must be {(B, T, H)} or {(B, T, H, K)}")
    if implementation not in ("auto", "naive", "chunked", "scan", "split"):
        raise ValueError(f"implementation {implementation!r}: choose naive, chunked, scan, split or auto")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1")

    run = functools.partial(_run, chunk=chunk, read=read, erase=erase, implementation=implementation)
    arrays = (q_BTHK, k_BTHK, w_BTHV, r_BTHK, log_decay, state, pos, bonus_HK)
    return _in_pieces(run, *arrays) if in_pieces(T) else run(*arrays)


def _run(
    q_BTHK: Array,
    k_BTHK: Array,
    w_BTHV: Array,
    r_BTHK: Array | None,
    log_decay: Array | None,
    state: Array | None,
    pos: Array | None,
    bonus_HK: Array | None,
    *,
    chunk: int,
    read: str,
    erase: str,
    implementation: str,
) -> tuple[Array, Array]:
    """The tokens of one device."""
    B, T, H, K = q_BTHK.shape
    dtype = wide(q_BTHK, w_BTHV)
    S = jnp.zeros((B, H, K, w_BTHV.shape[-1]), dtype) if state is None else state.astype(dtype)
    g = log_decay if log_decay is None or log_decay.ndim == 4 else log_decay[..., None]
    segment = fresh = valid = None
    if pos is not None:
        fresh, valid = pos == 0, pos >= 0
        segment = jnp.cumsum(fresh.astype(jnp.int32), 1)
    xs = Inputs(q_BTHK, k_BTHK, w_BTHV, r_BTHK, g, segment, fresh, valid)
    on_cpu = jax.default_backend() == "cpu"
    operand = q_BTHK.dtype if q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and not on_cpu else None
    bonus = None if bonus_HK is None else bonus_HK.astype(dtype)
    rule = Rule(read == "exclusive", erase == "undecayed", bonus, operand)

    if implementation == "auto":
        implementation = "naive" if T <= SHORT else "chunked"
    if implementation == "chunked":
        implementation = "split"
        if on_cpu:  # what a chunk adds grows with its size, what it spares does not: 5 to 25% faster than 64 and 128
            implementation, chunk = "scan", min(chunk, 32 if max(S.shape[-2:]) <= 64 else 64)
    if implementation == "split":  # it widens what it has cut: what is kept for the backward pass is as narrow as given
        y_BTHV, S = _split(xs, S, rule, chunk)
    elif implementation == "scan":
        y_BTHV, S = _scan(_widen(xs, dtype), S, rule, chunk)
    else:
        y_BTHV, S = _naive(_widen(xs, dtype), S, rule)
    return y_BTHV.astype(w_BTHV.dtype), S


def _in_pieces(
    run: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    w: Array,
    r: Array | None,
    g: Array | None,
    state: Array | None,
    pos: Array | None,
    bonus: Array | None,
) -> tuple[Array, Array]:
    """Tokens over devices. What a piece does to a state, S -> A S + B, is read off by running it: from zero that leaves
    B; with nothing written, from the identity, A, unless that is diagonal and known. One run does both."""
    dtype, (B, _, H, K), V = wide(q, w), q.shape, w.shape[-1]
    state = jnp.zeros((B, H, K, V), dtype) if state is None else state.astype(dtype)

    def piece(q, k, w, state, r=None, g=None, pos=None, bonus=None):
        rows, (own, heads) = (k, w, r, g), (q.shape[0], q.shape[2])
        if r is None:
            alone = run(q, *rows, None, pos, bonus)[1]
            kept = jnp.zeros((own, heads, 1, 1), dtype)
            if g is not None:
                steps = g if g.ndim == 4 else g[..., None]
                steps = steps if pos is None else jnp.where((pos >= 0)[..., None, None], steps, 0)
                kept = jnp.sum(steps.astype(dtype), 1)[..., None]
            forgets = False if pos is None else jnp.any(pos == 0, 1)[:, None, None, None]
            does = jnp.where(forgets, 0, jnp.exp(kept)), alone
            then = _fade_and_add
        else:
            nothing = jnp.zeros((*w.shape[:3], K), w.dtype)
            start = jnp.broadcast_to(jnp.eye(K, V + K, V, dtype=dtype), (own, heads, K, V + K))
            both = run(q, k, jnp.concatenate([w, nothing], -1), r, g, start, pos, None)[1]
            does, then = (both[..., V:], both[..., :V]), _turn_and_add
        enters, last = hand_on(does, then, state)
        return run(q, *rows, enters, pos, bonus)[0], last

    arguments = {
        "q": ("BTH", q), "k": ("BTH", k), "w": ("BTH", w), "r": ("BTH", r), "g": ("BTH", g),
        "state": ("BH", state), "pos": ("BT", pos), "bonus": ("H", bonus),
    }  # fmt: skip
    return by_pieces(piece, arguments, [("BTH", w.shape), ("BH", state.shape)])


def _fade_and_add(does: tuple[Array, Array], state: Array) -> Array:
    return does[0] * state + does[1]


def _turn_and_add(does: tuple[Array, Array], state: Array) -> Array:
    return jnp.matmul(does[0], state, precision=HIGHEST) + does[1]


def micro_steps(
    q_BTHK: Array, steps: list[tuple[Array, Array, Array | None, Array | None]], pos: Array | None, **options
) -> tuple[Array, Array]:
    """Several rank-one updates a token: `steps` are (key, write, row, log_decay) in order; the last one is read.

    All steps give the same fields (None where none does). Gated DeltaProduct and RWKV-7 are of this kind.
    """
    n = len(steps)

    def weave(parts):
        return None if parts[0] is None else rearrange(jnp.stack(parts, 2), "B T n ... -> B (T n) ...")

    k, w, r, g = (weave(parts) for parts in zip(*steps, strict=True))
    q = weave([jnp.zeros_like(q_BTHK)] * (n - 1) + [q_BTHK])
    if pos is not None:  # only a token's first micro-step may forget
        pos = weave([pos] + [jnp.where(pos == 0, 1, pos)] * (n - 1))
    y, state = recurrence(q, k, w, r, g, pos=pos, **options)
    return y[:, n - 1 :: n], state


def _widen(xs: Inputs, dtype: jnp.dtype) -> Inputs:
    r, g = (None if x is None else x.astype(dtype) for x in (xs.r, xs.g))
    return xs._replace(q=xs.q.astype(dtype), k=xs.k.astype(dtype), w=xs.w.astype(dtype), r=r, g=g)


def _naive(xs: Inputs, S: Array, rule: Rule) -> tuple[Array, Array]:
    """The definition."""

    def token(S, x: Inputs):
        if x.fresh is not None:
            S = jnp.where(x.fresh[:, None, None, None], 0, S)
        faded = S if x.g is None else jnp.exp(x.g)[..., None] * S
        written = x.w
        if x.r is not None:
            written -= jnp.einsum("BHK,BHKV->BHV", x.r, S if rule.undecayed else faded, precision=HIGHEST)
        new = faded + x.k[..., None] * written[..., None, :]
        seen = new
        if rule.exclusive:
            seen = S if rule.bonus is None else S + (rule.bonus[None] * x.k)[..., None] * x.w[..., None, :]
        y = jnp.einsum("BHK,BHKV->BHV", x.q, seen, precision=HIGHEST)
        return new if x.valid is None else jnp.where(x.valid[:, None, None, None], new, S), y

    if xs.q.shape[1] == 1:
        S, y = token(S, jax.tree.map(lambda x: x[:, 0], xs))
        return y[:, None], S
    S, y_TBHV = jax.lax.scan(token, S, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), xs))
    return jnp.moveaxis(y_TBHV, 0, 1), S


class Chunk(NamedTuple):
    """A chunk before its state is known; each [..., B, H, C, .]."""

    read: Array  # (Q e^G): what reads S_0
    scores: Array  # A
    lower: Array | None  # L
    erase: Array | None  # (R e^G)
    write: Array  # W
    keys: Array  # K e^{G_C - G}
    keep: Array | None  # e^{G_C}: [..., B, H, K or 1, 1]; None for 1
    extra: Array | None  # the bonus of the exclusive read


def _intra(x: Inputs, entering: Array | None, rule: Rule) -> Chunk:
    """All of a chunk that does not need its state. `entering` [..., B]: the segment that S_0 belongs to."""
    C = x.q.shape[-2]
    causal = jnp.tril(jnp.ones((C, C), bool))
    strict = jnp.tril(jnp.ones((C, C), bool), -1)
    continues = alive = keep = None
    if x.segment is not None and entering is not None:
        same = (x.segment[..., :, None] == x.segment[..., None, :])[..., None, :, :]
        causal, strict = (same & m.reshape((1,) * (same.ndim - 2) + m.shape) for m in (causal, strict))
        last = x.segment[..., -1:]
        continues = (x.segment == entering[..., None])[..., None, :, None]
        alive = (x.segment == last)[..., None, :, None]
        keep = (last == entering[..., None])[..., None, :, None]

    def only(mask, value):
        return value if mask is None else jnp.where(mask, value, 0)

    q, k, w, r, g = x.q, x.k, x.w, x.r, x.g
    read_mask = strict if rule.exclusive else causal
    if g is None:
        products = [_triangle(_mm(q, k, rule, transpose=True), read_mask)]
        if r is not None:
            products.append(_triangle(_mm(r, k, rule, transpose=True), strict))
        read, erase, keys, fade = q, r, k, None
    else:
        # A product, which is far faster here than cumsum, and begins anew with each segment: no sum that holds an
        # earlier document is subtracted from another.
        G = jnp.matmul(_ones_like(causal, g), g, precision=HIGHEST)
        before = G - g
        Gq = before if rule.exclusive else G
        Gr = before if rule.undecayed else G
        total = G[..., -1:, :]
        read = q * jnp.exp(Gq)
        erase = None if r is None else r * jnp.exp(Gr)
        keys = k * jnp.exp(total - G if alive is None else jnp.where(alive, total - G, -jnp.inf))
        fade = jnp.swapaxes(jnp.exp(total), -1, -2)
        if g.shape[-1] == 1:
            decay = _fade(Gq, G, read_mask)
            products = [_mm(q, k, rule, transpose=True) * decay]
            if r is not None:
                same_decay = rule.exclusive == rule.undecayed
                L = _mm(r, k, rule, transpose=True)
                products.append(_triangle(L * decay, strict) if same_decay else L * _fade(Gr, G, strict))
        else:
            rows = [Rows(q, Gq, not rule.exclusive)] + ([] if r is None else [Rows(r, Gr, False)])
            segment = None if x.segment is None else x.segment[..., None, :, None]
            products = decayed_products(rows, k, G, segment)
    if keep is not None:
        fade = keep.astype(q.dtype) if fade is None else jnp.where(keep, fade, 0)
    extra = None
    if rule.bonus is not None:
        extra = jnp.einsum("...HCK,HK,...HCK->...HC", q, rule.bonus, k, precision=HIGHEST)[..., None] * w
    return Chunk(
        only(continues, read),
        products[0],
        products[1] if r is not None else None,
        None if erase is None else only(continues, erase),
        w,
        only(alive, keys),
        fade,
        extra,
    )


def _ones_like(mask: Array, g: Array) -> Array:
    return mask.astype(g.dtype).reshape((1,) * (g.ndim - mask.ndim) + mask.shape)


def _triangle(product: Array, mask: Array) -> Array:
    return jnp.where(mask.reshape((1,) * (product.ndim - mask.ndim) + mask.shape), product, 0)


def _fade(Gq: Array, G: Array, mask: Array) -> Array:
    """e^{Gq_i - G_j} where the mask allows, else 0; the argument is masked, so that no gradient is 0 times infinity."""
    gap = Gq - jnp.swapaxes(G, -1, -2)
    return jnp.exp(jnp.where(mask.reshape((1,) * (gap.ndim - mask.ndim) + mask.shape), gap, -jnp.inf))


def _mm(a: Array, b: Array, rule: Rule, transpose: bool = False) -> Array:
    """a @ b, or a @ b^T."""
    return _times(a, jnp.swapaxes(b, -1, -2) if transpose else b, rule.operand)


def _times(a: Array, b: Array, operand: jnp.dtype | None) -> Array:
    """a @ b: float32 products in full float32 on every backend, bf16 operands accumulated in float32."""
    if operand is None:
        return jnp.matmul(a, b, precision=HIGHEST)
    return jnp.matmul(a.astype(operand), b.astype(operand), preferred_element_type=a.dtype)


def _step(S: Array, c: Chunk, rule: Rule) -> tuple[Array, Array]:
    """S_0 -> (S_C, Y)."""
    U = c.write
    if c.erase is not None:
        U = solve_unit_lower(c.lower, U - _mm(c.erase, S, rule))
    y = _mm(c.read, S, rule) + _mm(c.scores, U, rule)
    S = S if c.keep is None else c.keep * S
    return S + _mm(jnp.swapaxes(c.keys, -1, -2), U, rule), y if c.extra is None else y + c.extra


def _padded(xs: Inputs, chunk: int, group: int = 1) -> tuple[Inputs, int]:
    """Padding writes nothing, and T is a multiple of C · group. Returns (inputs, C)."""
    T = xs.q.shape[1]
    C = min(chunk, -(-T // 8) * 8)
    pad = -T % (C * group)
    k, g, segment = xs.k, xs.g, xs.segment
    if xs.valid is not None:
        k = jnp.where(xs.valid[..., None, None], k, 0)
        g = None if g is None else jnp.where(xs.valid[..., None, None], g, 0)
    q, k, w, r, g = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), (xs.q, k, xs.w, xs.r, g))
    segment = None if segment is None else jnp.pad(segment, ((0, 0), (0, pad)), mode="edge")
    return Inputs(q, k, w, r, g, segment, None, None), C


def _shifted(segment_BT: Array) -> Array:
    """The segment of the token before each."""
    return jnp.concatenate([jnp.zeros_like(segment_BT[:, :1]), segment_BT[:, :-1]], 1)


def _cut(xs: Inputs, chunk: int) -> tuple[Inputs, Array | None]:
    """Chunks first: [N, B, C, H, .]. Returns (chunks, the segment entering each [N, B])."""
    xs, C = _padded(xs, chunk)
    entering = None if xs.segment is None else _shifted(xs.segment)[:, ::C].T
    return jax.tree.map(lambda x: rearrange(x, "B (N C) ... -> N B C ...", C=C), xs), entering


def _heads(x: Inputs) -> Inputs:
    """[..., C, H, .] -> [..., H, C, .]; `segment` has no heads."""
    return jax.tree.map(lambda a: jnp.swapaxes(a, -2, -3), x._replace(segment=None))._replace(segment=x.segment)


def _scan(xs: Inputs, S: Array, rule: Rule, chunk: int) -> tuple[Array, Array]:
    """Everything in one scan over chunks; the backward pass recomputes its body, so only inputs and states are kept.

    Where a state is larger than the inputs of its chunk, states are kept for groups of four chunks only.
    """
    T, K, V = xs.q.shape[1], *S.shape[-2:]
    group = 4 if T > 8 * chunk and K * V > chunk * (2 * K + V) else 1
    # Without decay and erasure a chunk is products alone, and twice the size, up to 64, is faster in the backward pass.
    whole = group == 1 and chunk < T and chunk <= 32 and xs.g is None and xs.r is None
    group = 2 if whole else group
    xs, C = _padded(xs, chunk, group)
    segment, bonus, rule = xs.segment, rule.bonus, rule._replace(bonus=None)
    marks = None if segment is None else (segment, _shifted(segment))

    def body(bonus: Array | None, S: Array, x: Inputs, marks: tuple[Array, Array] | None) -> tuple[Array, Array]:
        segment, entering = (None, None) if marks is None else (marks[0], marks[1][:, 0])
        here = rule._replace(bonus=bonus)
        # Heads go before time here, in the core's cache, and not in the whole sequence at once.
        S, y_BHCV = _step(S, _intra(_heads(x._replace(segment=segment)), entering, here), here)
        return S, jnp.swapaxes(y_BHCV, -2, -3)

    S, y_BTHV = scan_chunks(body, bonus, S, xs._replace(segment=None), marks, C, group, whole=whole)
    return y_BTHV[:, :T], S


def _split(xs: Inputs, S: Array, rule: Rule, chunk: int) -> tuple[Array, Array]:
    """All chunks at once; a scan carries nothing but the state. Recomputed whole in the backward pass; y is as
    narrow as w.

    With U = U' - E' S_0 from the inverse of I + L, a chunk is S_C = e^{G_C} S_0 + K^T U' - (K^T E') S_0, which is one
    product a step, and Y = (Q - A E') S_0 + A U', which are products over all chunks.
    """

    @jax.checkpoint
    def run(xs: Inputs, S: Array):
        chunks, entering = _cut(xs, chunk)
        c = _intra(_widen(_heads(chunks), S.dtype), entering, rule)
        write, read, turn = c.write, c.read, None
        keys_T = jnp.swapaxes(c.keys, -1, -2)
        if c.erase is not None:
            inverse = unit_lower_inverse(c.lower)
            write = jnp.matmul(inverse, write, precision=HIGHEST)
            erase = jnp.matmul(inverse, c.erase, precision=HIGHEST)
            turn, read = _mm(keys_T, erase, rule), read - _mm(c.scores, erase, rule)
        entry, last = _states(rule.operand, c.keep, turn, _mm(keys_T, write, rule), S)
        y = _mm(read, entry, rule) + _mm(c.scores, write, rule)
        y = (y if c.extra is None else y + c.extra).astype(xs.w.dtype)
        return rearrange(y, "N B H C V -> B (N C) H V")[:, : xs.q.shape[1]], last

    return run(xs, S)


UNROLL = 8  # steps of a scan that are compiled as one: on a GPU starting a step takes longer than a step of sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(
    operand: jnp.dtype | None, keep: Array | None, turn: Array | None, added: Array, S: Array
) -> tuple[Array, Array]:
    """S <- keep S - turn S + added, chunk after chunk: the states that chunks start from, and the last.

    keep [N, B, H or 1, K or 1, 1], turn [N, B, H, K, K], either None; added [N, B, H, K, V]. The backward pass
    carries the state's cotangent alone: what belongs to `turn` and `keep` are products over all chunks.
    """

    def advance(S: Array, x: tuple[Array | None, Array | None, Array]) -> tuple[Array, Array]:
        keep, turn, added = x
        after = added + (S if keep is None else keep * S)
        return after if turn is None else after - _times(turn, S, operand), S

    last, entry = jax.lax.scan(advance, S, (keep, turn, added), unroll=UNROLL)
    return entry, last


def _states_forward(operand, keep, turn, added, S):
    entry, last = _states(operand, keep, turn, added, S)
    return (entry, last), (keep, turn, entry)


def _states_backward(operand, saved, slopes):
    keep, turn, entry = saved
    d_entry, d_last = slopes

    def back(after: Array, x: tuple[Array | None, Array | None, Array]) -> tuple[Array, Array]:
        keep, turn, d_entry = x
        before = d_entry + (after if keep is None else keep * after)
        return before if turn is None else before - _times(jnp.swapaxes(turn, -1, -2), after, operand), after

    d_S, after = jax.lax.scan(back, d_last, (keep, turn, d_entry), reverse=True, unroll=UNROLL)
    d_keep = d_turn = None
    if keep is not None:
        shared = tuple(i for i, n in enumerate(keep.shape) if n == 1)
        d_keep = jnp.sum(after * entry, shared, keepdims=True)
    if turn is not None:
        d_turn = -_times(after, jnp.swapaxes(entry, -1, -2), operand)
    return d_keep, d_turn, after, d_S


_states.defvjp(_states_forward, _states_backward)

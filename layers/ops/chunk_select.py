"""Attention to the few chunks of a text whose summaries answer a query best.

    score_tn = ask_t . summary_n / sqrt(F)        S_t = the `top` best of the chunks that t may read
    product:  y_t = sum over n in S_t of softmax_S(score_t)_n · attention(q_t; chunk n)
    union:    y_t = attention(q_t; what lies near t, and all chunks of S_t), under one softmax
    gated:    attention over the summaries of all readable chunks, over the chunks of S_t, and over what lies near

product is hierarchical chunk attention (Lampinen et al. 2021, arXiv 2105.14039), union is mixture of block attention
(Lu et al. 2025, arXiv 2502.13189), gated has the branches of native sparse attention (Yuan et al. 2025, 2502.11089).

N chunks of up to C slots lie one after the other, numbered as they were completed; a token may read those from `from`
up to `upto`. Two schedules: "naive" is the definition, with a score for each slot of each chunk. "chunked" fetches the
chunks that a query chose, a block of queries after the other, and computes a block again in its backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from layers.ops.chunk_loop import write
from layers.ops.place import MODEL, sizes
from layers.ops.precision import HIGHEST, wide
from layers.ops.routing import largest
from layers.ops.sequence import by_pieces, in_pieces

FETCHED = 2**22  # numbers that a block of queries fetches, about: 16 MB
LONGEST = 128  # queries in a block
DENSE = 2**19  # queries times slots up to which the definition is the faster form


class Counts(NamedTuple):
    """What has been laid of a row, int32: held_B tokens of an unfinished chunk, count_B complete chunks, of which the
    first from_B are of earlier documents; used_B slots of complete chunks, of which the first first_B are."""

    held_B: Array
    count_B: Array
    from_B: Array
    used_B: Array
    first_B: Array


class Places(NamedTuple):
    """Where the tokens of a piece stand, int32 [B, T].

    time: number in the piece, padding not counted; -1 for padding. start: that of its document's first token, below 0
    where that came in an earlier piece. slot: in its chunk. row: slot in the row, whose unfinished chunk gives way to
    the next document. lies: the same, S for tokens that gave way in this piece, and padding. done: 1 for the last of a
    chunk. from_, upto: chunks that it may read; upto is the number of its own.
    """

    time_BT: Array
    start_BT: Array
    slot_BT: Array
    row_BT: Array
    lies_BT: Array
    done_BT: Array
    from_BT: Array
    upto_BT: Array


class Near(NamedTuple):
    """Keys and values in order of time, and for each query the first and the last that it sees; none if last < first.

    The last ones of a block of queries follow one another.
    """

    k_BHSK: Array
    v_BHSV: Array
    first_BT: Array
    last_BT: Array


class Read(NamedTuple):
    """What was read, [B, T, H, V]: `selected` of the chosen chunks, and under union of what lies near; the others, or
    None where there is no such branch."""

    selected: Array
    near: Array | None
    compressed: Array | None


def places(
    pos_BT: Array, C: int, S: int, before: Counts, ends_BT: Array | None = None, least: int = 1
) -> tuple[Places, Counts, Array]:
    """Of the tokens of a piece, in chunks that begin with their document; what is laid then; and whether the chunk that
    was unfinished before still lies there, bool [B].

    A chunk ends with its C-th token, or sooner with one of `ends_BT` (bool; None: none) if that is its `least`-th or a
    later one. Chunks count the tokens of a document that were read: pos tells where documents begin, and what is
    padding.
    """
    valid_BT = pos_BT >= 0
    begins_BT = pos_BT == 0
    number_BT = jnp.cumsum(valid_BT, 1, dtype=jnp.int32)
    end_B1, time_BT = number_BT[:, -1:], jnp.where(valid_BT, number_BT - 1, -1)
    held_B1, count_B1, from_B1, used_B1, first_B1 = (a[:, None] for a in before)
    if ends_BT is None:  # of whole chunks, that of their document does
        origin_BT = lax.cummax(jnp.where(begins_BT, time_BT, -held_B1), axis=1)
        ends_BT = jnp.zeros_like(valid_BT)
    else:
        origin_BT = _origins(time_BT, begins_BT, ends_BT, held_B1, C, least)
    slot_BT = jnp.maximum(time_BT - origin_BT, 0) % C
    done_BT = (valid_BT & ((slot_BT == C - 1) | (ends_BT & (slot_BT >= least - 1)))).astype(jnp.int32)
    size_BT = done_BT * (slot_BT + 1)
    upto_BT = count_B1 + jnp.cumsum(done_BT, 1, dtype=jnp.int32) - done_BT
    under_BT = used_B1 + jnp.cumsum(size_BT, 1, dtype=jnp.int32) - size_BT  # slots of the chunks before its own
    from_BT = lax.cummax(jnp.where(begins_BT, upto_BT, from_B1), axis=1)
    start_BT = lax.cummax(jnp.where(begins_BT, time_BT, first_B1 - used_B1 - held_B1), axis=1)

    # A chunk stays if its document goes on until it is complete, or to the end of the piece.
    next_BT = lax.cummin(jnp.where(begins_BT, time_BT, end_B1), axis=1, reverse=True)
    after_BT = jnp.concatenate([next_BT[:, 1:], end_B1], 1)
    last_BT = lax.cummin(jnp.where(done_BT > 0, time_BT, end_B1), axis=1, reverse=True)  # of its chunk
    stays_BT = valid_BT & ((last_BT < after_BT) | (after_BT == end_B1))
    row_BT = under_BT + slot_BT
    at = Places(
        time_BT,
        start_BT,
        slot_BT,
        row_BT,
        jnp.where(stays_BT, row_BT, S),
        done_BT,
        jnp.where(valid_BT, from_BT, 0),
        jnp.where(valid_BT, upto_BT, 0),
    )
    stayed_B1 = (last_BT[:, :1] < next_BT[:, :1]) | (next_BT[:, :1] == end_B1)
    open_BT = jnp.where(done_BT > 0, time_BT + 1, jnp.where(begins_BT, time_BT, -held_B1))
    after = Counts(
        end_B1[:, 0] - jnp.max(open_BT, 1),
        before.count_B + jnp.sum(done_BT, 1, dtype=jnp.int32),
        from_BT[:, -1],
        before.used_B + jnp.sum(size_BT, 1, dtype=jnp.int32),
        lax.cummax(jnp.where(begins_BT, under_BT, first_B1), axis=1)[:, -1],
    )
    return at, after, stayed_B1[:, 0]


def _origins(time_BT: Array, begins_BT: Array, ends_BT: Array, held_B1: Array, C: int, least: int) -> Array:
    """The time of the first token of each token's chunk, int32 [B, T]; anything for padding.

    Where the next chunk would begin is known of each token as if one began with it. The chunks that do begin are those
    on the way from the documents' starts, which is walked in strides that double.
    """
    T = time_BT.shape[1]
    t_1T = jnp.arange(T, dtype=jnp.int32)[None]
    at_BT = jnp.where(time_BT < 0, T, time_BT)  # padding is left out

    def first_from(what_BT: Array) -> Array:
        """The first of these at or after each time, [B, T + 1]; T for none."""
        there_BT = lay(jnp.zeros_like(what_BT), at_BT, what_BT)
        first_BT = lax.cummin(jnp.where(there_BT, t_1T, T), axis=1, reverse=True)
        return jnp.pad(first_BT, ((0, 0), (0, 1)), constant_values=T)

    end_BT, begin_BT = first_from(ends_BT), first_from(begins_BT)

    def next_of(begin: Array) -> Array:
        """Where the chunk ends that begins at these times, below 0 for the one that was unfinished before: its next."""
        ended = jnp.take_along_axis(end_BT, jnp.clip(begin + least - 1, 0, T), 1)
        document = jnp.take_along_axis(begin_BT, jnp.clip(begin + 1, 0, T), 1)
        return jnp.minimum(jnp.minimum(begin + C, ended + 1), jnp.minimum(document, T))

    begun_BT = begin_BT[:, :T] == t_1T
    begun_BT |= next_of(jnp.where(begun_BT[:, :1], T, -held_B1)) == t_1T
    hop_BT, one_BT = next_of(jnp.broadcast_to(t_1T, begun_BT.shape)), jnp.ones_like(begun_BT)
    for _ in range((T - 1).bit_length()):
        begun_BT |= lay(jnp.zeros_like(begun_BT), jnp.where(begun_BT, hop_BT, T), one_BT)
        hop_BT = jnp.take_along_axis(jnp.pad(hop_BT, ((0, 0), (0, 1)), constant_values=T), hop_BT, 1)
    origin_BT = lax.cummax(jnp.where(begun_BT, t_1T, -held_B1), axis=1)
    return jnp.take_along_axis(origin_BT, jnp.maximum(time_BT, 0), 1)


def by_id(id_BT: Array, C: int, N: int) -> tuple[Array, Array, Array]:
    """Chunks told from outside, such as speakers or documents: id_BT in 0 .. N - 1, or negative for no chunk.

    Returns lies_BT, the slot of each token (N C for none: a chunk holds its first C tokens), size_BN, and upto_BT. A
    chunk is complete after the last token of its id in the row; chunks are numbered as they are completed.
    """
    T, n_N = id_BT.shape[1], jnp.arange(N, dtype=jnp.int32)
    t_1T1 = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    of_BTN = id_BT[..., None] == n_N[None, None]
    rank_BTN = jnp.cumsum(of_BTN, 1, dtype=jnp.int32)
    last_BN = jnp.max(jnp.where(of_BTN, t_1T1, -1), 1)
    done_BN = jnp.where(last_BN < 0, T, last_BN)  # ids that never come are behind all others
    other, own = done_BN[:, None, :], done_BN[:, :, None]
    earlier_BNN = (other < own) | ((other == own) & (n_N[None, None] < n_N[None, :, None]))
    number_BN = jnp.sum(earlier_BNN, -1, dtype=jnp.int32)
    slot_BT = jnp.sum(jnp.where(of_BTN, rank_BTN - 1, 0), -1, dtype=jnp.int32)
    chunk_BT = jnp.sum(jnp.where(of_BTN, number_BN[:, None], 0), -1, dtype=jnp.int32)
    lies_BT = jnp.where((id_BT >= 0) & (slot_BT < C), chunk_BT * C + slot_BT, N * C)
    takes_BNN = number_BN[:, :, None] == n_N[None, None]
    size_BN = jnp.sum(jnp.where(takes_BNN, jnp.minimum(rank_BTN[:, -1], C)[..., None], 0), 1, dtype=jnp.int32)
    upto_BT = jnp.sum(done_BN[:, None] < t_1T1, -1, dtype=jnp.int32)
    return lies_BT, size_BN, upto_BT


def lay(rows_BS: Array, lies_BT: Array, new_BT: Array) -> Array:
    """[B, S, ...] with the new tokens [B, T, ...] in their slots; those of slot S are dropped."""
    if lies_BT.shape[1] == 1:
        # As in layers.attention: with a second write, to no slot, XLA on CPU leaves the cache in place.
        lies_BT = jnp.pad(lies_BT, ((0, 0), (0, 1)), constant_values=rows_BS.shape[1])
        new_BT = jnp.pad(new_BT, ((0, 0), (0, 1), *[(0, 0)] * (new_BT.ndim - 2)))
    return write(rows_BS, lies_BT, new_BT.astype(rows_BS.dtype))


def chunk_attention(
    q_BTHK: Array,
    k_BHSK: Array,
    v_BHSV: Array,
    ask_BTGF: Array,
    summary_BNGF: Array,
    from_BT: Array,
    upto_BT: Array,
    *,
    chunk: int,
    top: int,
    weight: str = "product",
    near: Near | None = None,
    reach: int = 1,
    content_BNHV: Array | None = None,
    size_BN: Array | None = None,
    begin_BN: Array | None = None,
    block: int | None = None,
    implementation: str = "auto",
) -> Read:
    """Reads in the dtype of q: zero where there is nothing to read.

    k_BHSK, v_BHSV: chunk n lies in slots n C .. n C + C - 1, S >= N C; or from begin_BN on, S >= C. Their dtype may be
        that of a cache.
    ask_BTGF, summary_BNGF: what chunks are chosen by, in float32 or float64: G = 1 for all heads as one, or H.
    from_BT, upto_BT: int32, the chunks that a query may read are from .. upto - 1.
    near, reach: what else a query sees, and how many at most; under a softmax of its own but for union.
    content_BNHV: values of the summaries, for gated, which reads them by the scores that choose.
    size_BN: tokens of each chunk, which fill its first slots; None = C. begin_BN: its first slot; None = n C.
    block: queries at a time of "chunked". implementation: "naive" | "chunked" | "auto".

    Of equal scores the first chunk is chosen. Softmaxes and sums are float32 (float64 for float64 inputs). The choice
    has no gradient, so that ask and summary have none under union.
    """
    (B, T, H, _), S, (N, G) = q_BTHK.shape, v_BHSV.shape[2], summary_BNGF.shape[1:3]
    if G not in (1, H) or N < 1 or S < chunk * (N if begin_BN is None else 1):
        raise ValueError(f"chunk_attention: {N} chunks of {chunk} in {S} slots, {G} scores for {H} heads: do not fit")
    if (weight != "product" and near is None) or (weight == "gated" and content_BNHV is None):
        raise ValueError(f"chunk_attention: {weight} asks for `near`, and gated for `content_BNHV`")
    if implementation == "auto":
        implementation = "naive" if 1 < T and T * N * chunk <= DENSE else "chunked"
    if implementation not in ("naive", "chunked"):
        raise ValueError(f"chunk_attention: implementation is {implementation!r}, not naive, chunked or auto")
    if size_BN is None:
        size_BN = jnp.full((B, N), chunk, jnp.int32)
    beside = None if near is None else (near.k_BHSK, near.v_BHSV)
    text = _Text(k_BHSK, v_BHSV, summary_BNGF, size_BN, begin_BN, beside, content_BNHV)
    nothing_BT = jnp.full((B, T), -1, jnp.int32)
    sight = (nothing_BT, nothing_BT) if near is None else (near.first_BT, near.last_BT)
    asked = _Asked(q_BTHK, ask_BTGF, from_BT, upto_BT, *sight)
    how = _How(chunk, min(top, N), weight, reach, implementation == "naive")
    read = _by_pieces if in_pieces(T) else _by_blocks
    return read(text, asked, how, block)


class _How(NamedTuple):
    chunk: int
    top: int
    weight: str
    reach: int
    dense: bool


class _Text(NamedTuple):
    k_BHSK: Array
    v_BHSV: Array
    summary_BNGF: Array
    size_BN: Array
    begin_BN: Array | None
    near: tuple[Array, Array] | None
    content_BNHV: Array | None


class _Asked(NamedTuple):
    q_BTHK: Any
    ask_BTGF: Any
    from_BT: Any
    upto_BT: Any
    first_BT: Any
    last_BT: Any


class _Found(NamedTuple):
    """Scores of some slots of the text, which of them a query sees, and an average of their values by weights."""

    s_BHTS: Array
    seen_BGTS: Array
    average: Callable[[Array], Array]


def _by_blocks(text: _Text, asked: _Asked, how: _How, block: int | None) -> Read:
    """What queries read, a block of them after the other where that is how."""
    (B, T, H, K), V = asked.q_BTHK.shape, text.v_BHSV.shape[-1]
    if block is None:
        block = min(max(FETCHED // (B * how.top * how.chunk * H * (K + V)), 1), LONGEST)
    if how.dense or block >= T:
        return _read(text, asked, how)
    turns = -(-T // block)

    def cut(a: Array, fill: int) -> Array:
        a = jnp.pad(a, ((0, 0), (0, turns * block - T), *[(0, 0)] * (a.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(a.reshape(B, turns, block, *a.shape[2:]), 1, 0)

    # Queries that fill up the last block see nothing.
    parts = jax.tree.map(cut, asked, _Asked(0, 0, 0, 0, -1, -1))
    again = jax.checkpoint(lambda text, part: _read(text, part, how), prevent_cse=False)
    _, out = lax.scan(lambda _, part: (None, again(text, part)), None, parts)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, turns * block, *a.shape[3:])[:, :T], out)


def _by_pieces(text: _Text, asked: _Asked, how: _How, block: int | None) -> Read:
    """Tokens over devices: the text is sent to all, and each device reads for the queries that it has."""
    q, G = asked.q_BTHK, asked.ask_BTGF.shape[2]
    H = "H" if q.shape[2] % sizes().get(MODEL, 1) == 0 else " "
    scores = H if G > 1 else " "
    arguments = {
        "k_BHSK": ("B" + H, text.k_BHSK), "v_BHSV": ("B" + H, text.v_BHSV),
        "summary_BNGF": ("B " + scores, text.summary_BNGF), "content_BNHV": ("B " + H, text.content_BNHV),
        "size_BN": ("B", text.size_BN), "begin_BN": ("B", text.begin_BN),
        "near": ("B" + H, text.near),
        "q_BTHK": ("BT" + H, q), "ask_BTGF": ("BT" + scores, asked.ask_BTGF),
        **{name: ("BT", getattr(asked, name)) for name in ("from_BT", "upto_BT", "first_BT", "last_BT")},
    }  # fmt: skip
    branches = (True, text.near is not None and how.weight != "union", how.weight == "gated")

    def piece(**parts: Any) -> tuple[Array, ...]:
        own = _Text(*map(parts.get, _Text._fields)), _Asked(*map(parts.get, _Asked._fields))  # type: ignore[arg-type]
        return tuple(y for y in _by_blocks(*own, how, block) if y is not None)

    shape = (*q.shape[:3], text.v_BHSV.shape[-1])
    found = iter(by_pieces(piece, arguments, [("BT" + H, shape)] * sum(branches)))
    return Read(*(next(found) if there else None for there in branches))  # type: ignore[arg-type]


def _read(text: _Text, asked: _Asked, how: _How) -> Read:
    """What some queries read."""
    q_BHTK, kind = asked.q_BTHK.swapaxes(1, 2), wide(asked.q_BTHK)
    score_BGTN = jnp.einsum("btgf,bngf->bgtn", asked.ask_BTGF, text.summary_BNGF, precision=HIGHEST)
    score_BGTN = score_BGTN.astype(kind) * asked.ask_BTGF.shape[-1] ** -0.5
    n_111N = jnp.arange(score_BGTN.shape[-1], dtype=jnp.int32)[None, None, None]
    from_B1T1, upto_B1T1 = (a[:, None, :, None] for a in (asked.from_BT, asked.upto_BT))
    readable_B1TN = (from_B1T1 <= n_111N) & (n_111N < upto_B1T1)
    chosen = largest(score_BGTN, how.top, readable_B1TN)
    found, worth_BGTN, live_BGTN = (_all if how.dense else _fetched)(text, q_BHTK, score_BGTN, chosen, how.chunk)
    near = None if text.near is None else _near(*text.near, q_BHTK, asked, how)

    beside = compressed = None
    if how.weight == "union":
        assert near is not None
        far, G = found.s_BHTS.shape[-1], found.seen_BGTS.shape[1]
        near_seen_BGTS = jnp.broadcast_to(near.seen_BGTS, (len(q_BHTK), G, *near.seen_BGTS.shape[2:]))
        seen_BGTS = jnp.concatenate([found.seen_BGTS, near_seen_BGTS], -1)
        p_BHTS = softmax(jnp.concatenate([found.s_BHTS, near.s_BHTS], -1), seen_BGTS)
        y_BHTV = found.average(p_BHTS[..., :far]) + near.average(p_BHTS[..., far:])
    else:
        if how.weight == "product":
            s_BHTNC, seen_BGTNC = (a.reshape(*a.shape[:-1], -1, how.chunk) for a in found[:2])
            p_BHTNC = softmax(s_BHTNC, seen_BGTNC) * softmax(worth_BGTN, live_BGTN)[..., None]
            p_BHTS = p_BHTNC.reshape(found.s_BHTS.shape)
        else:
            p_BHTS = softmax(found.s_BHTS, found.seen_BGTS)
        y_BHTV = found.average(p_BHTS)
        beside = None if near is None else near.average(softmax(near.s_BHTS, near.seen_BGTS))
    if how.weight == "gated":
        assert text.content_BNHV is not None
        p_BHTN = softmax(score_BGTN, readable_B1TN).astype(text.content_BNHV.dtype)
        compressed = jnp.einsum("bhtn,bnhv->bhtv", p_BHTN, text.content_BNHV, preferred_element_type=kind)

    def out(y_BHTV: Array) -> Array:
        return y_BHTV.swapaxes(1, 2).astype(q_BHTK.dtype)

    return Read(out(y_BHTV), None if beside is None else out(beside), None if compressed is None else out(compressed))


def _all(text: _Text, q_BHTK: Array, score_BGTN: Array, chosen: list[Array], C: int) -> tuple[_Found, Array, Array]:
    """Every slot of every chunk, of which those of chosen chunks are seen."""
    N = score_BGTN.shape[-1]
    live_BGTN = functools.reduce(jnp.logical_or, chosen)
    k_BHSK, v_BHSV = text.k_BHSK, text.v_BHSV
    if text.begin_BN is None:
        k_BHSK, v_BHSV = k_BHSK[:, :, : N * C], v_BHSV[:, :, : N * C]
    first_BN, lead_BN, end_BN = _slots(text, C)
    if text.begin_BN is not None:  # as for one query that reads all chunks
        k_BHSK, v_BHSV = (fetch(a, first_BN[:, None, None], C)[:, :, 0] for a in (k_BHSK, v_BHSV))
    c_11C = jnp.arange(C, dtype=jnp.int32)[None, None]
    filled_BNC = (lead_BN[..., None] <= c_11C) & (c_11C < end_BN[..., None])
    seen_BGTS = (live_BGTN[..., None] & filled_BNC[:, None, None]).reshape(*live_BGTN.shape[:3], N * C)
    return _meet("bhs", q_BHTK, k_BHSK, v_BHSV, seen_BGTS), score_BGTN, live_BGTN


def _slots(text: _Text, C: int) -> tuple[Array, Array, Array]:
    """Of each chunk, int32 [B, N]: the first of C slots in a row that hold it, and it is those from `lead` to `end`."""
    if text.begin_BN is None:
        n_1N = jnp.arange(text.size_BN.shape[1], dtype=jnp.int32)[None]
        return jnp.broadcast_to(n_1N * C, text.size_BN.shape), jnp.zeros_like(text.size_BN), text.size_BN
    first_BN = jnp.minimum(text.begin_BN, text.k_BHSK.shape[2] - C)  # so that behind the last ones lie C too
    lead_BN = text.begin_BN - first_BN
    return first_BN, lead_BN, lead_BN + text.size_BN


def _fetched(text: _Text, q_BHTK: Array, score_BGTN: Array, chosen: list[Array], C: int) -> tuple[_Found, Array, Array]:
    """The slots of chosen chunks alone."""
    live_BGTN = jnp.stack([jnp.any(one, -1) for one in chosen], -1)

    def of_chosen(a_BGTN: Array) -> Array:
        return jnp.stack([jnp.sum(jnp.where(one, a_BGTN, 0), -1, dtype=a_BGTN.dtype) for one in chosen], -1)

    first, lead, end = (of_chosen(a[:, None, None]) for a in _slots(text, C))
    c_1111C = jnp.arange(C, dtype=jnp.int32)[None, None, None, None]
    filled_BGTNC = (lead[..., None] <= c_1111C) & (c_1111C < end[..., None])
    seen_BGTS = (live_BGTN[..., None] & filled_BGTNC).reshape(*live_BGTN.shape[:3], -1)
    k_BHTSK, v_BHTSV = fetch(text.k_BHSK, first, C), fetch(text.v_BHSV, first, C)
    return _meet("bhts", q_BHTK, k_BHTSK, v_BHTSV, seen_BGTS), of_chosen(score_BGTN), live_BGTN


def _near(k_BHSK: Array, v_BHSV: Array, q_BHTK: Array, asked: _Asked, how: _How) -> _Found:
    """What lies near, or the band of it that a block of queries sees."""
    (B, _, S, _), T, last_BT = k_BHSK.shape, q_BHTK.shape[2], asked.last_BT
    band, begin_B = S, jnp.zeros(B, jnp.int32)
    if not how.dense and how.reach + T - 1 < S:
        band = how.reach + T - 1
        begin_B = jnp.min(jnp.where(last_BT < 0, S, last_BT), 1) - (how.reach - 1)
        begin_B = jnp.clip(begin_B, 0, S - band)
        cut = jax.vmap(lambda a, i: lax.dynamic_slice_in_dim(a, i, band, 1))
        k_BHSK, v_BHSV = cut(k_BHSK, begin_B), cut(v_BHSV, begin_B)
    index_B1S = (begin_B[:, None] + jnp.arange(band, dtype=jnp.int32)[None])[:, None]
    seen_BTS = (asked.first_BT[..., None] <= index_B1S) & (index_B1S <= last_BT[..., None])
    return _meet("bhs", q_BHTK, k_BHSK, v_BHSV, seen_BTS[:, None])


def _meet(axes: str, q_BHTK: Array, k: Array, v: Array, seen_BGTS: Array) -> _Found:
    """axes: of keys and values, but for the last."""
    kind = wide(q_BHTK)
    dtype = q_BHTK.dtype if q_BHTK.dtype == k.dtype == v.dtype else wide(q_BHTK, k, v)  # a cache may have another
    q, k, v = (a.astype(dtype) for a in (q_BHTK, k, v))
    s_BHTS = jnp.einsum(f"bhtk,{axes}k->bhts", q, k, preferred_element_type=kind) * q.shape[-1] ** -0.5

    def average(p_BHTS: Array) -> Array:
        return jnp.einsum(f"bhts,{axes}v->bhtv", p_BHTS.astype(dtype), v, preferred_element_type=kind)

    return _Found(s_BHTS, seen_BGTS, average)


def fetch(a_BHSK: Array, at_BGTN: Array, C: int) -> Array:
    """The C slots from each of `at` on, one after the other: [B, H, T, N C, K]."""

    def one(a_SK: Array, first: Array) -> Array:
        return lax.dynamic_slice_in_dim(a_SK, first, C)

    (B, H, _, K), (_, _, T, N) = a_BHSK.shape, at_BGTN.shape
    of_queries = jax.vmap(jax.vmap(one, (None, 0)), (None, 0))
    found = jax.vmap(jax.vmap(of_queries))(a_BHSK, jnp.broadcast_to(at_BGTN, (B, H, T, N)))
    return found.reshape(B, H, T, N * C, K)


def softmax(s: Array, seen: Array) -> Array:
    """Over the last axis, of what is seen (for all heads, or each); zero where nothing is.

    The gradient is finite whatever is not seen.
    """
    top = lax.stop_gradient(jnp.max(jnp.where(seen, s, -jnp.inf), -1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, s - top, 0)), 0)
    total = jnp.sum(p, -1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)

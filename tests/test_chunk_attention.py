"""Chunk attention: by hand, what may not be read, two schedules of one sum, and the layers that it is in the limit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx
from reading import QUICK, B, D, Said, apply, cast, pad, places, pull, same, same_tree, stream, tokens

from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.ops import chunk_select
from layers.ops.chunk_select import Near, by_id, chunk_attention, lay

T, C = 29, 4
SAID = tokens(np.stack([pad(places(T, 6, 7, 20), (0, 2), (12, 15), (T - 2, T)), places(T, 17)]))
CONFIGS = (
    ChunkAttention(H=2, K=8, chunk=C, top=2),
    ChunkAttention(H=2, K=8, F=5, chunk=C, top=2, window=3),
    ChunkAttention(H=2, K=8, chunk=C, top=2, weight="union"),
    ChunkAttention(H=2, K=8, chunk=C, top=2, weight="gated", window=6, position="rope"),
)


def built(config, seed: int = 0):
    return cast(config.build(D, rngs=nnx.Rngs(seed)), np.float64)


def read_by(layer, **changes):
    """The same parameters under another config."""
    config = dataclasses.replace(layer.config, **changes)
    structure = jax.tree.structure(jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0))))
    return jax.tree.unflatten(structure, jax.tree.leaves(layer))


def live(y_BTD, said=SAID):
    return np.where((said.pos_BT >= 0)[..., None], y_BTD, 0)


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_product_by_hand(implementation, float64):
    """Three chunks of two, identity maps: the chunks [1, 0] and [0, 1] of the means are the best two for [1, 0]."""
    m = jnp.asarray([[2.0, 0], [0, 0], [0, 2], [0, 0], [-2, 0], [0, 0]])[None, None]
    query = jnp.asarray([1.0, 0]).reshape(1, 1, 1, 2)
    means = jnp.mean(m.reshape(1, 3, 2, 1, 2), 2)
    none, all_ = (jnp.full((1, 1), n, jnp.int32) for n in (0, 3))
    read = jax.jit(functools.partial(chunk_attention, chunk=2, top=2, implementation=implementation))
    y = read(query, m, m, query, means, none, all_).selected
    np.testing.assert_allclose(y[0, 0, 0], [1.07755, 0.33024], atol=5e-6)
    assert not read(query, m, m, query, means, none, none).selected.any()


N, H, K, Q, REACH = 5, 2, 3, 11, 4


def scene(weight: str, seed: int = 0):
    """Arrays for Q queries and N chunks with equal summaries among them, and who may read what."""
    rng = np.random.default_rng(seed)
    G, F = (1, 2) if weight == "product" else (H, K)
    shapes = (B, Q, H, K), (B, H, N * C + 1, K), (B, H, N * C + 1, K), (B, Q, G, F), (B, N, G, F), (B, N, H, K)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[4][:, 3] = arrays[4][:, 1]
    near = [rng.standard_normal((B, H, Q + 3, K)) for _ in range(2)]
    from_BT = rng.integers(0, 3, (B, Q))
    upto_BT = np.minimum(from_BT + rng.integers(0, 4, (B, Q)), N)
    last_BT = np.arange(Q) + 3 - np.cumsum(np.arange(Q) == 5)
    last_BT = np.stack([np.where(np.arange(Q) == 5, -1, last_BT), np.arange(Q) + 3])
    first_BT = np.maximum(last_BT - rng.integers(0, REACH, (B, Q)), 0)
    size_BN = rng.integers(1, C + 1, (B, N))
    return arrays + near, [a.astype(np.int32) for a in (from_BT, upto_BT, first_BT, last_BT, size_BN)]


def by_hand(weight: str, top: int, arrays, places_) -> list[np.ndarray]:
    """The equations, a query and a head at a time."""
    q, k, v, ask, summary, content, near_k, near_v = arrays
    from_, upto, first, last, size = places_
    y = np.zeros((3, *q.shape))
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h if ask.shape[2] > 1 else 0
        score = {n: ask[b, t, g] @ summary[b, n, g] / np.sqrt(ask.shape[-1]) for n in range(from_[b, t], upto[b, t])}
        chosen = sorted(score, key=lambda n: (-score[n], n))[:top]
        slots = [[n * C + c for c in range(size[b, n])] for n in chosen]
        seen = range(first[b, t], last[b, t] + 1)

        def mean(scores, values):
            e = np.exp(scores - np.max(scores, initial=-np.inf))
            return e @ values / e.sum() if len(scores) else np.zeros(K)

        def attend(keys, values, at=(b, t, h)):
            return mean(keys @ q[at] / np.sqrt(K), values)

        parts = [attend(k[b, h, s], v[b, h, s]) for s in slots]
        near = near_k[b, h, seen], near_v[b, h, seen]
        flat = [s for one in slots for s in one]
        y[1, b, t, h] = attend(*near)
        if weight == "product":
            y[0, b, t, h] = mean(np.array([score[n] for n in chosen]), np.array(parts))
        elif weight == "union":
            y[0, b, t, h] = attend(np.concatenate([k[b, h, flat], near[0]]), np.concatenate([v[b, h, flat], near[1]]))
        else:
            y[0, b, t, h] = attend(k[b, h, flat], v[b, h, flat])
            y[2, b, t, h] = mean(np.array(list(score.values())), content[b, list(score), h])
    return [y[0], *([y[1]] if weight != "union" else []), *([y[2]] if weight == "gated" else [])]


@pytest.mark.parametrize("weight", ["product", "union", "gated"])
def test_schedules_are_the_equations(weight, float64):
    """With ties, chunks that are not full, fewer readable chunks than `top`, or none; in blocks of queries or not."""
    arrays, (from_BT, upto_BT, first_BT, last_BT, size_BN) = scene(weight)
    rng = np.random.default_rng(1)

    @functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
    def run(implementation, block, arrays):
        def read(q, k, v, ask, summary, content, near_k, near_v):
            read = chunk_attention(
                *(q, k, v, ask, summary, from_BT, upto_BT),
                chunk=C,
                top=3,
                weight=weight,
                near=Near(near_k, near_v, first_BT, last_BT),
                reach=REACH,
                content_BNHV=content,
                size_BN=size_BN,
                block=block,
                implementation=implementation,
            )
            return [y for y in read if y is not None]

        y, back = jax.vjp(read, *arrays)
        return y, back([jnp.asarray(dy[: y_.size].reshape(y_.shape)) for y_, dy in zip(y, slopes, strict=False)])

    slopes = rng.standard_normal((3, B * Q * H * K))
    want = by_hand(weight, 3, arrays, (from_BT, upto_BT, first_BT, last_BT, size_BN))
    naive, d_naive = run("naive", None, arrays)
    same_tree(naive, want, "naive against the equations")
    for block in (None, 4):
        y, d = run("chunked", block, arrays)
        same_tree(y, naive, f"chunked, blocks of {block}")
        same_tree(d, d_naive, f"gradients of chunked, blocks of {block}")
    # The choice has no gradient: under union nothing goes into what is asked and summed up.
    assert np.any(d_naive[3]) == np.any(d_naive[4]) == (weight != "union")


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda config: config.weight)
def test_the_layer_reads_alike_by_both(config, float64, monkeypatch):
    """Packed documents and padding, eight queries a block."""
    monkeypatch.setattr(chunk_select, "LONGEST", 8)
    layer, x_BTD, dy_BTD = built(config), stream(T), live(stream(T, 1))
    want_y, *want = pull(read_by(layer, implementation="naive"), x_BTD, SAID, dy_BTD)
    y_BTD, *slopes = pull(read_by(layer, implementation="chunked"), x_BTD, SAID, dy_BTD)
    same(live(y_BTD), live(want_y), "y")
    same_tree(jax.tree.leaves(slopes), jax.tree.leaves(want), "gradients")


def test_blocks_of_queries_on_a_mesh(monkeypatch):
    """The law judges examples, whose queries are one block."""
    monkeypatch.setattr(chunk_select, "LONGEST", 8)
    laws.a_mesh_changes_nothing(
        ChunkAttention(H=2, K=8, chunk=C, top=3, weight="gated", window=5, implementation="chunked")
    )


OFTEN = tuple(range(0, 50, 3))  # words at which chunks end
TOLD = (
    dataclasses.replace(CONFIGS[1], chunk=6, boundary=(3, 7, 11, 21, 30, 41), least=1),
    dataclasses.replace(CONFIGS[2], chunk=6, boundary=OFTEN, position="none", least=2),
    dataclasses.replace(CONFIGS[3], chunk=6, boundary=OFTEN, least=3),
)


def whole(config, ids_T, chunk: list[int]) -> bool:
    """Whether a chunk is at its end."""
    return len(chunk) == config.chunk or (len(chunk) >= config.least and ids_T[chunk[-1]] in config.boundary)


def chunks_by_hand(config, ids_T, pos_T) -> list[list[int]]:
    """The tokens of each chunk of a row, a token at a time; a chunk that its document left unfinished is the last or
    is followed by a chunk of another document."""
    chunks, ended = [], True
    for t in range(len(pos_T)):
        if pos_T[t] < 0:
            continue
        if ended or pos_T[t] == 0:
            chunks.append([])
        chunks[-1].append(t)
        ended = whole(config, ids_T, chunks[-1])
    return chunks


def literally(layer, x_BTD, said):
    """What a layer with a boundary answers, from masks of tokens by tokens: no slots, no state, no fetching."""
    c, T, rows = layer.config, x_BTD.shape[1], []
    for b in range(len(x_BTD)):
        pos_T, ids_T = said.pos_BT[b], said.ids_BT[b]
        chunks = chunks_by_hand(c, ids_T, pos_T)
        N, document_T = len(chunks), np.cumsum(pos_T == 0)
        of_NT = np.array([[t in one for t in range(T)] for one in chunks])
        own_T = np.array([next((n for n in range(N) if of_NT[n, t]), -1) for t in range(T)])
        slot_T = np.array([chunks[n].index(t) if n >= 0 else 0 for t, n in enumerate(own_T)])
        whole_N = [whole(c, ids_T, one) for one in chunks]
        valid_T, t_T = pos_T >= 0, np.arange(T)
        same_TT = (document_T[:, None] == document_T[None]) & valid_T[:, None] & valid_T[None]
        before_TT = same_TT & (t_T[None] <= t_T[:, None])
        read_TN = np.array([[same_TT[t, one[0]] and one[-1] < t for one in chunks] for t in range(T)])
        read_TN &= np.array(whole_N)[None]
        ago_TT = np.cumsum(valid_T)[:, None] - np.cumsum(valid_T)[None]
        near_TT = before_TT & ((own_T[:, None] == own_T[None]) if c.weight == "union" else (ago_TT < c.window))

        q_THK, k_THK, v_THV, ask_TGF, told_TGF = (a[0] for a in layer._maps(x_BTD[b][None], pos_T[None], slot_T[None]))
        mean_NGF = jnp.einsum("nt,tgf->ngf", of_NT / of_NT.sum(1, keepdims=True), told_TGF)
        answers = []
        for h in range(c.H):
            g = h if ask_TGF.shape[1] > 1 else 0
            F = ask_TGF.shape[2]
            score_TN = ask_TGF[:, g] @ mean_NGF[:, g, :F].T / np.sqrt(F)
            s_TT = q_THK[:, h] @ k_THK[:, h].T / np.sqrt(layer.K)
            order_TN = np.argsort(np.where(read_TN, -np.asarray(jax.lax.stop_gradient(score_TN)), np.inf), 1, "stable")
            chosen_TN = read_TN & (np.argsort(order_TN, 1) < c.top)
            far_TT = chosen_TN @ of_NT

            def mean(s, seen, values):
                p = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0)), 0)
                return p / jnp.maximum(p.sum(1, keepdims=True), 1e-300) @ values

            v_TV = v_THV[:, h]
            if c.weight == "union":
                answers.append(mean(s_TT, far_TT | near_TT, v_TV))
                continue
            near_TV = mean(s_TT, near_TT, v_TV)
            if c.weight == "product":
                parts_NTV = jnp.stack([mean(s_TT, np.broadcast_to(of_NT[n], (T, T)), v_TV) for n in range(N)])
                p_TN = mean(score_TN, chosen_TN, jnp.eye(N))
                answers.append(jnp.einsum("tn,ntv->tv", p_TN, parts_NTV) + near_TV)
            else:
                gate_TM = jax.nn.sigmoid(layer.gate(x_BTD[b][None])[0, :, :, h])
                three = mean(score_TN, read_TN, mean_NGF[:, g, F:]), mean(s_TT, far_TT, v_TV), near_TV
                answers.append(sum(gate_TM[:, i, None] * part for i, part in enumerate(three)))
        rows.append(layer.out(jnp.stack(answers, 1)[None])[0])
    return jnp.stack(rows)


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[pytest.mark.slow] * (c.weight != "product"), id=c.weight) for c in TOLD]
)
def test_chunks_that_words_end_are_the_definition(config, float64, monkeypatch):
    """Packed documents and padding; y and every gradient, by both schedules, and one token at a time."""
    monkeypatch.setattr(chunk_select, "LONGEST", 8)
    layer, x_BTD, dy_BTD = built(config), stream(T), live(stream(T, 1))
    rows = zip(SAID.ids_BT, SAID.pos_BT, strict=True)
    chunks = [(ids, one) for ids, pos in rows for one in chunks_by_hand(config, ids, pos)]
    sizes = {len(one) for ids, one in chunks if whole(config, ids, one)}
    inside = any(ids[t] in config.boundary for ids, one in chunks for t in one[:-1])
    assert max(sizes) == 6 and len(sizes) > 2 and inside == (config.least > 1), sizes

    def want(layer):
        y_BTD, back = jax.vjp(lambda layer, x: literally(layer, x, SAID), layer, jnp.asarray(x_BTD))
        return live(y_BTD), jax.tree.leaves(back(jnp.asarray(dy_BTD)))

    want_y, slopes = want(layer)
    for name in ("naive", "chunked"):
        y_BTD, *got = pull(read_by(layer, implementation=name), x_BTD, SAID, dy_BTD)
        same(live(y_BTD), want_y, f"y, {name}")
        same_tree(jax.tree.leaves(got), slopes, f"gradients, {name}")
    state, ys = cast(layer.init_state(B, T), np.float64), []
    for t in range(T):
        y_B1D, state = apply(layer, x_BTD[:, t : t + 1], Said(*(a[:, t : t + 1] for a in SAID)), state)
        ys.append(y_B1D)
    same(live(np.concatenate(ys, 1)), want_y, "y, one by one")


def test_only_complete_chunks_of_the_past_are_read(float64):
    """Without a readable chunk y is exactly zero; a token alters y where its chunk is complete, and at its own place.

    Not where another chunk was chosen: with top = all, everywhere behind.
    """
    layer, x_BTD = built(dataclasses.replace(CONFIGS[0], top=9)), stream(T)
    said = tokens(np.stack([places(T, 6, 7, 20), pad(places(T, 17), (3, 5))]))
    y_BTD, _ = apply(layer, x_BTD, said, None)
    document, chunk = np.cumsum(said.pos_BT == 0, 1), said.pos_BT // C
    for row in range(B):
        valid = said.pos_BT[row] >= 0
        assert not y_BTD[row][valid & (chunk[row] == 0)].any() and y_BTD[row][valid & (chunk[row] > 0)].all()
    for t in (1, 5, 9, 10, 21):
        other = x_BTD.copy()
        other[:, t] += 1
        got, _ = apply(layer, other, said, None)
        changed = (np.asarray(got) != np.asarray(y_BTD)).any(-1)
        behind = (document == document[:, t : t + 1]) & (chunk > chunk[:, t : t + 1]) & (said.pos_BT >= 0)
        own = (np.arange(T) == t)[None] & (chunk > 0)
        np.testing.assert_array_equal(changed, behind | own)


def test_union_of_all_chunks_is_attention(float64):
    """And with fewer it is not."""
    layer = built(ChunkAttention(H=2, K=8, chunk=C, top=9, weight="union", position="rope"))
    whole = built(Attention(H=2, K=8))
    whole.query, whole.key, whole.value, whole.out = layer.query, layer.key, layer.value, layer.out
    x_BTD, dy_BTD = stream(T), live(stream(T, 1))
    want_y, want, want_dx = pull(whole, x_BTD, SAID, dy_BTD)
    for name in ("naive", "chunked"):
        y_BTD, slopes, dx_BTD = pull(read_by(layer, implementation=name), x_BTD, SAID, dy_BTD)
        same(live(y_BTD), live(want_y), f"y, {name}")
        same(dx_BTD, want_dx, f"dx, {name}")
        same(slopes.key.w[...], want.key.w[...], f"gradient in the keys' map, {name}")
    y_BTD, _ = apply(read_by(layer, top=1), x_BTD, SAID, None)
    assert np.abs(live(y_BTD) - live(want_y)).max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda config: config.weight)
def test_decoding_across_chunks_is_training(config, float64):
    layer, x_BTD = built(config), stream(T)
    want = live(apply(layer, x_BTD, SAID, None)[0])
    state, ys = cast(layer.init_state(B, T), np.float64), []
    for t in range(T):
        y_B1D, state = apply(layer, x_BTD[:, t : t + 1], Said(*(a[:, t : t + 1] for a in SAID)), state)
        ys.append(y_B1D)
        counts = state.counts
        assert (np.asarray(counts.held_B) < C).all() and (counts.from_B <= counts.count_B).all()
    same(live(np.concatenate(ys, 1)), want, "y")


def test_a_cache_of_bfloat16_reads_alike_however_cut():
    layer = ChunkAttention(H=2, K=8, chunk=C, top=2, weight="union", cache_dtype="bfloat16").build(D, rngs=nnx.Rngs(0))
    x_BTD, said = stream(T).astype(np.float32), tokens(np.stack([places(T)] * B))
    want, end = apply(layer, x_BTD, said, layer.init_state(B, T))
    assert end.keys_BHSK.dtype == jnp.bfloat16 and end.summary_BSF.dtype == jnp.float32
    state, ys = layer.init_state(B, T), []
    for t in range(T):
        y_B1D, state = apply(layer, x_BTD[:, t : t + 1], Said(*(a[:, t : t + 1] for a in said)), state)
        ys.append(y_B1D)
    same(np.concatenate(ys, 1), want, "y", 1e-5)


def test_a_full_cache_says_so():
    layer = CONFIGS[0].build(D, rngs=nnx.Rngs(0))
    x_BTD, said = stream(10).astype(np.float32), tokens(np.stack([places(10), places(10, 3)]))
    cut = [(x_BTD[:, i : i + 5], Said(*(a[:, i : i + 5] for a in said))) for i in (0, 5)]
    empty = layer.init_state(B, 8)
    assert len({id(a) for a in jax.tree.leaves(empty)}) == len(jax.tree.leaves(empty)), "an array twice: no donation"
    y_BTD, state = apply(layer, *cut[0], empty)
    assert np.isfinite(y_BTD).all()
    y_BTD, _ = apply(layer, *cut[1], state)
    # Row 0 has eight slots for ten tokens; in row 1 the second document took the slots of the first.
    np.testing.assert_array_equal(np.isnan(y_BTD).all(-1), [[0, 0, 0, 1, 1], [0] * 5])
    with pytest.raises(ValueError, match="reads a piece of 10 tokens into a state for 8"):
        apply(layer, x_BTD, said, layer.init_state(B, 8))


def test_stop_gradient_keeps_what_is_remembered_out_of_reach(float64):
    layer, x_BTD = built(CONFIGS[0]), stream(T)
    dy_BTD = np.zeros_like(x_BTD)
    dy_BTD[1, 13] = 1
    y_BTD, slopes, dx_BTD = pull(layer, x_BTD, SAID, dy_BTD)
    stopped_y, stopped, stopped_dx = pull(read_by(layer, stop_gradient=True), x_BTD, SAID, dy_BTD)
    same(stopped_y, y_BTD, "y")
    same_tree(stopped, slopes, "gradients of the maps")
    moved, stopped_moved = (np.flatnonzero(np.any(a[1], -1)) for a in (dx_BTD, stopped_dx))
    assert len(moved) == 2 * C + 1 and list(stopped_moved) == [13]


def test_chunks_told_from_outside(float64):
    """Three speakers take turns: each is a chunk once it has said its last; its first C tokens are kept."""
    id_BT = jnp.asarray([[2, 2, 0, 2, 0, -1, 1, 0, 1, 1, 1, 1], [1] * 6 + [0] * 6], jnp.int32)
    lies_BT, size_BN, upto_BT = jax.jit(by_id, static_argnums=(1, 2))(id_BT, C, 3)
    # Row 0: speaker 2 ends at 3, speaker 0 at 7, speaker 1 at the end; row 1: 1, then 0, and no 2.
    np.testing.assert_array_equal(lies_BT[0], [0, 1, 4, 2, 5, 12, 8, 6, 9, 10, 11, 12])
    np.testing.assert_array_equal(lies_BT[1], [0, 1, 2, 3, 12, 12, 4, 5, 6, 7, 12, 12])
    np.testing.assert_array_equal(size_BN, [[3, 3, 4], [4, 4, 0]])
    np.testing.assert_array_equal(upto_BT, [[0] * 4 + [1] * 4 + [2] * 4, [0] * 6 + [1] * 6])

    m_BTHK = jnp.asarray(np.random.default_rng(0).standard_normal((B, 12, 1, 3)))
    laid_BHSK = lay(jnp.zeros((B, 12, 1, 3)), lies_BT, m_BTHK).swapaxes(1, 2)
    means = jnp.sum(laid_BHSK.reshape(B, 3, C, 1, 3), 2) / np.maximum(size_BN, 1.0)[..., None, None]
    from_BT = jnp.zeros_like(upto_BT)
    for name in ("naive", "chunked"):
        run = jax.jit(functools.partial(chunk_attention, chunk=C, top=2, implementation=name))
        read = run(m_BTHK, laid_BHSK, laid_BHSK, m_BTHK, means, from_BT, upto_BT, size_BN=size_BN).selected
        assert not read[0, :4].any() and not read[1, :6].any()
        q, said = m_BTHK[0, 5, 0], m_BTHK[0, jnp.array([0, 1, 3]), 0]  # speaker 2 alone can be read
        same(read[0, 5, 0], jax.nn.softmax(said @ q / np.sqrt(3)) @ said, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkAttention(chunk=0), "ChunkAttention.chunk is 0: it must be at least 1"),
        (lambda: ChunkAttention(top=0), "ChunkAttention.top is 0: it must be at least 1"),
        (lambda: ChunkAttention(boundary=(3, -1)), r"ChunkAttention.boundary is \(3, -1\): .* at least 0"),
        (lambda: ChunkAttention(least=4), "ChunkAttention.least is 4: without a boundary .* so say None"),
        (lambda: ChunkAttention(boundary=(3,), least=40), "ChunkAttention.least is 40: it must be at most chunk = 32"),
        (lambda: ChunkAttention(weight="sum"), "ChunkAttention.weight is 'sum': it must be one of product, union, gat"),
        (lambda: ChunkAttention(weight="union", window=8), "ChunkAttention.window is 8: union .* so say None"),
        (lambda: ChunkAttention(weight="gated"), "ChunkAttention.window is None: gated .* such as 64"),
        (lambda: ChunkAttention(weight="union", F=8), "ChunkAttention.F is 8: union .* so say None"),
        (lambda: ChunkAttention(H=5).build(64, rngs=nnx.Rngs(0)), "ChunkAttention.H is 5"),
        (lambda: ChunkAttention(K=7, position="rope").build(64, rngs=nnx.Rngs(0)), "ChunkAttention.K is 7"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

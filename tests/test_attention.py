"""Softmax attention: the schedules agree, nothing grows with T·T, and a cache remembers what it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.layer import Tokens
from layers.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    S: int | None = None  # None: self-attention at plain times
    H: int = 2
    G: int = 2
    K: int = 8
    V: int = 8
    window: int | None = None
    documents: bool = False
    head_major: bool = False


CASES = [
    Case(1),
    Case(63, H=4, G=2, window=1),
    Case(65, V=5, window=7),
    Case(100, H=6, G=2, K=6, documents=True),
    Case(65, documents=True, window=20),
    Case(9, S=63, H=4, G=1, head_major=True),
    Case(33, S=100, window=24, head_major=True, V=6),
]


def arrays(case: Case, dtype=np.float64, B: int = 2) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """(q, k, v, dy) and the times of a case."""
    rng = np.random.default_rng(case.T)
    T, S, H, G = case.T, case.S or case.T, case.H, case.G
    shapes = (B, T, H, case.K), (B, S, G, case.K), (B, S, G, case.V), (B, T, H, case.V)
    q, k, v, dy = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    if case.head_major:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    times = {}
    if case.S is not None:
        # A ring that has come round, with empty slots; queries among and after its tokens, and one of padding.
        ring = np.stack([np.roll(np.arange(S) + 3, 11), np.roll(np.arange(S) - 9, 40)])
        query = np.stack([np.arange(T) + S - T // 2, np.where(np.arange(T) == 4, -1, np.arange(T) + 20)])
        times = dict(query_time=query, key_time=np.maximum(ring, -1), since=np.full((B, T), 5))
    elif case.documents:
        valid = rng.random((B, T)) > 0.2
        time = np.where(valid, np.cumsum(valid, 1) - 1, -1)
        starts = np.where(rng.random((B, T)) > 0.9, time, 0)
        times = dict(query_time=time, key_time=time, since=np.maximum.accumulate(starts, 1))
    return [q, k, v, dy], {name: a.astype(np.int32) for name, a in times.items()}


@functools.partial(jax.jit, static_argnames=("implementation", "window", "head_major", "block"))
def pulled(q, k, v, dy, times, **options):
    y, back = jax.vjp(lambda q, k, v: attention(q, k, v, **times, **options), q, k, v)
    return y, *back(dy)


def run(case: Case, implementation: str, dtype=np.float64, block: int = 16) -> list[np.ndarray]:
    inputs, times = arrays(case)
    inputs = [jnp.asarray(a, dtype) for a in inputs]
    out = pulled(
        *inputs, times, implementation=implementation, window=case.window, head_major=case.head_major, block=block
    )
    assert [a.dtype for a in out] == [dtype] * 4
    return [np.asarray(a, np.float64) for a in out]


def by_hand(case: Case) -> np.ndarray:
    """The definition, one query and one key at a time."""
    (q, k, v, _), times = arrays(case)
    if case.head_major:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    B, T, H, K = q.shape
    plain = np.broadcast_to(np.arange(T), (B, T))
    query_time, key_time = times.get("query_time", plain), times.get("key_time", plain)
    since = times.get("since", np.zeros((B, T)))
    y = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        seen = [
            s
            for s in range(k.shape[1])
            if key_time[b, s] >= 0
            and since[b, t] <= key_time[b, s] <= query_time[b, t]
            and (case.window is None or query_time[b, t] - key_time[b, s] < case.window)
        ]
        if seen:
            g = h // (H // case.G)
            weights = np.exp([q[b, t, h] @ k[b, s, g] / K**0.5 for s in seen])
            y[b, t, h] = weights @ v[b, seen, g] / weights.sum()
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_naive_is_the_definition(case: Case, float64):
    want, got = run(case, "naive"), run(case, "blocks")
    np.testing.assert_allclose(want[0], by_hand(case), rtol=1e-11, atol=1e-12)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert np.abs(b).max() > 0.01 or name in ("dq", "dk") and (case.T == 1 or case.window == 1)
        # A query that sees one key has no slope: rounding is all that is left there.
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max() + 1e-14, name


def test_gradients_are_the_slopes(float64):
    """Of both, against central differences in a random direction."""
    case = CASES[3]
    (q, k, v, dy), times = arrays(case)
    direction = [np.random.default_rng(i).standard_normal(a.shape) for i, a in enumerate((q, k, v))]

    @jax.jit
    def value(step):
        y = attention(
            *(a + step * d for a, d in zip((q, k, v), direction, strict=True)), **times, implementation="naive"
        )
        return jnp.sum(y * dy)

    want = float(value(1e-5) - value(-1e-5)) / 2e-5
    for implementation in ("naive", "blocks"):
        gradients = run(case, implementation)[1:]
        assert sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("implementation", ["naive", "blocks"])
def test_low_precision_stays_close(implementation: str, float64):
    """RMSE over RMS at most 0.005 forward and 0.008 backward: what flash-linear-attention holds its ops to."""
    case = CASES[3]
    inputs, times = arrays(case)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in inputs]
    options = dict(window=case.window, head_major=False, block=16)
    got = pulled(*rounded, times, implementation=implementation, **options)
    want = pulled(*(a.astype(jnp.float64) for a in rounded), times, implementation="naive", **options)
    for a, b, ratio in zip(got, want, (0.005, 0.008, 0.008, 0.008), strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.asarray(a, np.float64) - np.asarray(b)
        assert np.sqrt((error**2).mean() / (np.asarray(b) ** 2).mean()) <= ratio


@pytest.mark.parametrize("implementation", ["naive", "blocks"])
def test_who_sees_nothing_says_nothing(implementation: str):
    inputs, _ = arrays(Case(40), np.float32)
    time = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40)).copy()
    blind = np.where(time % 3 == 0, -1, time)
    times = dict(query_time=blind, key_time=np.where(time < 30, time, -1), since=np.maximum(time - 2, 0))
    y, dq, dk, dv = pulled(*inputs, times, implementation=implementation, window=None, head_major=False, block=16)
    nothing = (blind < 0) | (time >= 32)
    assert not np.asarray(y)[nothing].any() and not np.asarray(dq)[nothing].any()
    assert np.asarray(y)[~nothing].all() and all(np.isfinite(a).all() for a in (y, dq, dk, dv))


def test_blocks_out_of_sight_cost_nothing():
    """Whatever lies in a block that no query of a block may see is never read: not even a NaN comes through."""
    (q, k, v, _), _ = arrays(Case(64, H=2, G=2), np.float32)
    k[:, 48:], v[:, 48:] = np.nan, np.nan  # the future of three blocks
    k[:, :16], v[:, :16] = np.nan, np.nan  # another document, and out of the window
    time = np.broadcast_to(np.arange(64, dtype=np.int32), (2, 64))
    read = jax.jit(functools.partial(attention, implementation="blocks", block=16), static_argnames="window")
    document = dict(query_time=time, key_time=time, since=np.where(time < 16, 0, 16).astype(np.int32))
    assert np.isfinite(read(q, k, v, **document)[:, 16:48]).all()
    assert np.isfinite(read(q, k, v, window=16)[:, 32:48]).all()
    assert np.isnan(read(q, k, v)[:, 16:48]).all()


@pytest.mark.parametrize("implementation", ["naive", "blocks"])
def test_keys_that_are_always_seen(implementation: str, float64):
    """One softmax over the window's scores and those of more keys, met by queries of their own; in bfloat16 as well."""
    B, T, H, K, P, window = 2, 40, 2, 8, 3, 5
    rng = np.random.default_rng(0)
    q, k, v, free = (rng.standard_normal((B, T, H, K)) for _ in range(4))
    more_k, more_v = (rng.standard_normal((B, P, H, K)) for _ in range(2))
    scores = np.einsum("bthk,bshk->bhts", q, k) / K**0.5
    age = np.arange(T)[:, None] - np.arange(T)[None]
    scores = np.where((age >= 0) & (age < window), scores, -np.inf)
    scores = np.concatenate([scores, np.einsum("bthk,bphk->bhtp", free, more_k) / K**0.5], -1)
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.einsum("bhts,bshv->bthv", share, np.concatenate([v, more_v], 1))
    for dtype, allowed in ((jnp.float64, 1e-12), (jnp.bfloat16, 2e-2)):
        a, b, c, *always = (jnp.asarray(x, dtype) for x in (q, k, v, free, more_k, more_v))
        y = attention(a, b, c, window=window, always=tuple(always), implementation=implementation)
        assert y.dtype == dtype
        error = np.sqrt(np.mean(np.square(np.asarray(y, np.float64) - want)) / np.mean(np.square(want)))
        assert error < allowed


def test_under_transforms():
    """vmap with and without times of its own, and a scan over checkpointed layers."""
    inputs, times = arrays(Case(33, documents=True), np.float32)
    q, k, v, _ = inputs
    op = jax.jit(functools.partial(attention, implementation="blocks", block=16))
    alone = [op(q, k, v, query_time=t, key_time=t) for t in (times["query_time"], times["query_time"][::-1])]
    t = np.stack([times["query_time"], times["query_time"][::-1]])
    together = jax.jit(jax.vmap(lambda t: op(q, k, v, query_time=t, key_time=t)))(t)
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)

    def deep(op, x, scales):
        return jnp.sum(
            jax.lax.scan(jax.checkpoint(lambda x, c: (x + op(c * x, x, x, **times), None)), x, scales)[0] ** 2
        )

    scales = jnp.ones(3)
    got, want = (
        jax.jit(jax.grad(functools.partial(deep, op)))(q, scales)
        for op in (op, functools.partial(attention, implementation="naive"))
    )
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_nothing_grows_with_the_square_of_length():
    """Temporary memory of forward and backward is linear in T, far below T·T; the program's size is constant."""

    def program(T: int):
        heads = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        time = jax.ShapeDtypeStruct((1, T), jnp.int32)
        times = dict(query_time=time, key_time=time, since=time)
        options = dict(implementation="auto", window=None, head_major=False, block=None)
        lowered = pulled.lower(heads, heads, heads, heads, times, **options)
        return len(lowered.as_text()), lowered.compile().memory_analysis().temp_size_in_bytes

    (short_text, short_bytes), (long_text, long_bytes) = program(1024), program(4096)
    assert long_text <= 1.1 * short_text
    assert long_bytes <= 5 * short_bytes
    assert long_bytes <= 4096 * 4096 * 4 / 10


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_what_cudnn_is_asked_for_is_the_definition(monkeypatch, documents: bool, window: int | None):
    """Its mask, order and window, read by JAX's own attention; documents and padding within the rows."""
    asked = []

    def plain(*args, implementation: str, **how):
        asked.append(implementation)
        return real(*args, implementation="xla", **how)

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    (q, k, v, dy), times = arrays(Case(65, H=4, G=2, documents=documents), np.float32)

    def pulled(**how):
        y, pull = jax.vjp(lambda *qkv: attention(*qkv, window=window, **times, **how), q, k, v)
        return y, *pull(dy)

    for got, want in zip(pulled(implementation="cudnn", ordered=True), pulled(implementation="naive"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    assert asked == ["cudnn"]


TIMES = dict.fromkeys(("query_time", "key_time"), np.zeros((2, 8), np.int32))


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(k=np.zeros((2, 8, 3, 8))), "do not divide"),
        (dict(k=np.zeros((2, 9, 2, 8))), "do not agree"),
        (dict(k=np.zeros((2, 9, 2, 8)), v=np.zeros((2, 9, 2, 8))), "need query_time"),
        (dict(window=0), "at least 1"),
        (dict(since=np.zeros((2, 8), np.int32)), "only with"),
        (dict(query_time=np.zeros((2, 8), np.int32)), "come together"),
        (dict(implementation="fast"), "'fast'"),
        (dict(implementation="cudnn", v=np.zeros((2, 8, 2, 4))), "cudnn"),
        (dict(implementation="cudnn", **TIMES), "cudnn knows no times out of order"),
        (dict(ordered=True, **(TIMES | dict.fromkeys("kv", np.zeros((2, 9, 2, 8))))), "not the same tokens"),
    ],
)
def test_says_what_is_wrong(change: dict, complaint: str):
    given = dict(q=np.zeros((2, 8, 4, 8)), k=np.zeros((2, 8, 2, 8)), v=np.zeros((2, 8, 2, 8))) | change
    if given["k"].shape[2] == 3:
        given["v"] = np.zeros((2, 8, 3, 8))
    given = {name: jnp.asarray(a, jnp.float32) if name in "qkv" else a for name, a in given.items()}
    with pytest.raises(ValueError, match=complaint):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


# The layer. Its laws are tested with everyone's (test_laws.py); here is what they leave open.

D = 64


def build(**fields):
    return Attention(**fields).build(D, rngs=nnx.Rngs(0))


def said(pos_BT: np.ndarray) -> Tokens:
    return Tokens(np.zeros(pos_BT.shape, np.int32), pos_BT.astype(np.int32))


@jax.jit
def apply(layer, x_BTD, tokens, state):
    out = layer(x_BTD, tokens, state)
    return out.y_BTD, out.state


def size(tree) -> int:
    return sum(a.size for a in jax.tree.leaves(tree))


def test_parameters_and_state_are_as_large_as_told():
    assert size(build(H=4)) == 4 * D * D
    layer = build(H=4, G=2, K=10, qk_norm=True, gate=True, bias=True)
    assert size(layer) == D * 10 * (2 * 4 + 2 * 2) + D * 4 * 10 + 2 * 10 + 10 * (4 + 2 * 2)
    for window, S in ((None, 32), (5, 5), (50, 32)):
        state = jax.eval_shape(
            lambda window=window: build(H=4, G=2, window=window, cache_dtype="bfloat16").init_state(3, 32)
        )
        assert sum(a.size * a.dtype.itemsize for a in state) == 3 * (2 * S * 2 * 16 * 2 + 4 * (S + 2))


@pytest.mark.parametrize("fields", [dict(H=4, G=2, window=5), dict(H=2, G=1)], ids=str)
def test_decoding_from_a_long_piece_is_the_full_pass(fields: dict, float64):
    """A piece several times the ring, then token by token, ragged across rows by padding."""
    layer = jax.tree.map(lambda a: a.astype(np.float64), build(**fields))
    x_BTD = np.random.default_rng(0).standard_normal((2, 40, D))
    pos_BT = np.stack([np.arange(40), np.r_[[-1] * 6, np.arange(10), -1, np.arange(23)]])
    full, _ = apply(layer, x_BTD, said(pos_BT), None)
    state = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, layer.init_state(2, 40))
    for start, stop in [(0, 23), *[(t, t + 1) for t in range(23, 40)]]:
        y, state = apply(layer, x_BTD[:, start:stop], said(pos_BT[:, start:stop]), state)
        np.testing.assert_allclose(y, full[:, start:stop], rtol=1e-9, atol=1e-12)
    assert state.time_B.tolist() == [40, 33] and state.start_B.tolist() == [0, 10]


def test_caches_of_another_dtype(float64):
    """Double precision is right to the precision of the cache, and any cut reads the same rounded numbers."""
    x_BTD = np.random.default_rng(0).standard_normal((2, 12, D))
    tokens = said(np.broadcast_to(np.arange(12), (2, 12)))
    for cache_dtype, error in (("float32", 1e-6), ("bfloat16", 2e-2)):
        layer = build(H=4, cache_dtype=cache_dtype)
        wide = jax.tree.map(lambda a: a.astype(np.float64), layer)
        full, _ = apply(wide, x_BTD, tokens, None)
        once, end = apply(wide, x_BTD, tokens, layer.init_state(2, 12))
        assert end.keys_BGSK.dtype == cache_dtype
        assert 0 < np.abs(np.asarray(once - full)).max() <= error * np.abs(np.asarray(full)).max()
        state = layer.init_state(2, 12)
        for t in range(12):
            y, state = apply(wide, x_BTD[:, t : t + 1], Tokens(*(a[:, t : t + 1] for a in tokens)), state)
            np.testing.assert_allclose(y, once[:, t : t + 1], rtol=1e-9, atol=1e-12)


def test_a_full_cache_is_never_wrong_in_silence():
    layer = build(H=2)
    x_BTD = np.ones((1, 6, D), np.float32)
    with pytest.raises(ValueError, match="6 tokens into a state for 4.*init_state"):
        layer(x_BTD, said(np.arange(6)[None]), layer.init_state(1, 4))
    for fields in (dict(H=2), dict(H=2, window=5)):
        layer = build(**fields)
        state, ys = layer.init_state(1, 4), []
        for t in range(6):
            y, state = apply(layer, x_BTD[:, :1], said(np.array([[t]])), state)
            ys.append(np.isnan(y).all() if np.isnan(y).any() else False)
        assert ys == [False] * 4 + [True] * 2


def test_a_decoding_loop_writes_its_cache_in_place():
    layer = build(H=4, K=16)
    state = layer.init_state(1, 4096)

    @functools.partial(jax.jit, donate_argnums=2)
    def loop(layer, x_B1D, state):
        def step(t, carry):
            x_B1D, state = carry
            out = layer(x_B1D, said_at(t), state)
            return out.y_BTD, out.state

        return jax.lax.fori_loop(0, 50, step, (x_B1D, state))

    def said_at(t):
        return Tokens(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), t, jnp.int32))

    temporary = loop.lower(layer, jnp.ones((1, 1, D)), state).compile().memory_analysis().temp_size_in_bytes
    assert temporary <= state.keys_BGSK.nbytes / 4


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(H=5), "H is 5, which does not divide D = 64"),
        (dict(H=4, G=3), "G is 3, which does not divide H = 4"),
        (dict(H=4, K=7), "K is 7: rotary"),
        (dict(window=0), "window is 0"),
        (dict(cache_dtype="int8"), "cache_dtype is 'int8': it must be one of float32, bfloat16"),
    ],
)
def test_the_config_says_what_is_wrong(fields: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        build(**fields)

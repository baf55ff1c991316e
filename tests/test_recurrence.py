"""The recurrences: every fast form against the definition, in float64, with gradients, at awkward lengths and gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from layers.ops.delta import delta_recurrence
from layers.ops.linear import linear_recurrence
from layers.ops.pairs import Rows, decayed_products
from layers.ops.recurrence import micro_steps, recurrence
from layers.ops.triangular import solve_unit_lower, unit_lower_inverse

KINDS = [(family, decay) for family in ("linear", "delta") for decay in ("none", "head", "channel")]
B, H, K, V = 2, 2, 12, 10


def inputs(T: int, family: str, decay: str, *, seed: int = 0, dtype=np.float64) -> dict[str, Array | None]:
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, T, H, K)) for _ in range(2))
    shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, K)}[decay]
    gates = None if shape is None else -rng.exponential(size=shape) * rng.integers(0, 2, shape)
    arrays = {
        "q": q,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, T, H, V)),
        "beta": 2 * rng.uniform(size=(B, T, H)) if family == "delta" else None,
        "log_decay": gates,
        "state": rng.normal(size=(B, H, K, V)),
    }
    return {name: None if x is None else jnp.asarray(x, dtype) for name, x in arrays.items()}


def documents(T: int) -> Array:
    """Places of packed documents: lengths of 1 and more, starts on and off the grid, padding left, inside and right."""
    pos = np.arange(T)[None].repeat(B, 0) + 3
    for start in (37, 38, 64, 90):
        pos[0, start:] = np.arange(max(T - start, 0))
    pos[1, 50:] = np.arange(max(T - 50, 0))
    pos[1, 5:9] = pos[1, :1] = pos[:, T - 1 :] = -1
    return jnp.asarray(pos, jnp.int32)


def run(x: dict, implementation: str, pos: Array | None = None, chunk: int = 64) -> list[Array]:
    """[y, final state, every gradient] of a loss that weighs all of y and of the state, each number by its own."""
    x = {name: value for name, value in x.items() if value is not None}
    rng = np.random.default_rng(9)
    weight_y, weight_S = (jnp.asarray(rng.normal(size=a.shape), x["state"].dtype) for a in (x["v"], x["state"]))

    def loss(x):
        args = [x["q"], x["k"], x["v"]] + ([x["beta"]] if "beta" in x else [])
        function = delta_recurrence if "beta" in x else linear_recurrence
        y, state = function(
            *args, x.get("log_decay"), state=x["state"], pos=pos, chunk=chunk, implementation=implementation
        )
        if pos is not None:
            y = jnp.where((pos >= 0)[..., None, None], y, 0)  # y at padding is nobody's business
        return jnp.sum(y.astype(state.dtype) * weight_y) + jnp.sum(state * weight_S), (y, state)

    (_, (y, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return [y, state, *grads.values()]


def worst(reference: list[Array], other: list[Array]) -> float:
    """Largest relative error, by norm, of any of the arrays; NaN counts as infinite."""

    def error(a: Array, b: Array) -> float:
        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
        found = np.linalg.norm(a64 - b64) / (np.linalg.norm(a64) + 1e-12)
        return np.inf if np.isnan(found) else float(found)

    return max(error(a, b) for a, b in zip(reference, other, strict=True))


@pytest.mark.parametrize("schedule", ["scan", "split"])
@pytest.mark.parametrize(("family", "decay"), KINDS)
def test_chunked_equals_definition(float64, family, decay, schedule):
    """Packed documents, padding, an initial state, a length that no chunk divides."""
    x, pos = inputs(100, family, decay), documents(100)
    assert worst(run(x, "naive", pos), run(x, schedule, pos, chunk=32)) < 1e-9


@pytest.mark.parametrize("T", [1, 63, 64, 65, 500])
def test_awkward_lengths(float64, T):
    x = inputs(T, "delta", "head")
    assert worst(run(x, "naive"), run(x, "chunked")) < 1e-9


@pytest.mark.parametrize("chunk", [1, 20, 64])
def test_chunks_of_any_size(float64, chunk):
    x = inputs(100, "delta", "channel")
    assert worst(run(x, "naive"), run(x, "scan", chunk=chunk)) < 1e-9


def test_states_of_groups_only(float64):
    """A state larger than its chunk's inputs is kept for every fourth chunk: same numbers."""
    x = inputs(100, "delta", "head")
    assert K * V > 3 * (2 * K + V) and 100 > 8 * 3  # takes that path
    assert worst(run(x, "naive"), run(x, "scan", chunk=3)) < 1e-9


@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("erase", ["decayed", "undecayed"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_general_form(float64, read, erase, decay):
    """Any row r (Comba, RWKV-7), the exclusive read with its bonus (RWKV-6)."""
    x, pos = inputs(40, "delta", decay), jnp.asarray(documents(100)[:, 30:70])
    row = 0.3 * jnp.asarray(np.random.default_rng(1).normal(size=(B, 40, H, K)))
    bonus = jnp.full((H, K), 0.3) if read == "exclusive" else None

    def both(implementation):
        def loss(q, k, v, row, g):
            y, state = recurrence(
                q, k, v, row, g, state=x["state"], pos=pos, chunk=16, read=read, erase=erase, bonus_HK=bonus,
                implementation=implementation,
            )  # fmt: skip
            y = jnp.where((pos >= 0)[..., None, None], y, 0)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(
            x["q"], x["k"], x["v"], row, x["log_decay"]
        )
        return [*out, *grads]

    assert worst(both("naive"), both("scan")) < 1e-9


def test_definition_by_hand(float64):
    """Three tokens of the delta rule with decay, and a document start, against arithmetic done here."""
    k = jnp.asarray([[1.0, 0], [0.6, 0.8], [0, 1.0]])[None, :, None]
    v = jnp.asarray([[2.0], [3.0], [5.0]])[None, :, None]
    g, beta = jnp.log(jnp.asarray([[[1.0], [0.5], [0.25]]])), jnp.asarray([[[1.0], [0.5], [1.0]]])
    # S1 = [2, 0]; faded [1, 0]; erased k.S = .6, S2 = [1, 0] + .5 (3 - .6) [.6, .8] = [1.72, .96]
    # faded [.43, .24]; k = e2 with beta 1 overwrites: S3 = [.43, 5]
    y, state = delta_recurrence(k, k, v, beta, g, implementation="naive")
    np.testing.assert_allclose(np.ravel(state), [0.43, 5.0], atol=1e-12)
    np.testing.assert_allclose(np.ravel(y), [2.0, 0.6 * 1.72 + 0.8 * 0.96, 5.0], atol=1e-12)
    pos = jnp.asarray([[0, 1, 0]], jnp.int32)
    y, state = delta_recurrence(k, k, v, beta, g, pos=pos, implementation="naive")
    np.testing.assert_allclose(np.ravel(state), [0.0, 5.0], atol=1e-12)


@pytest.mark.parametrize("keys", ["random", "equal", "positive"])
@pytest.mark.parametrize("decay", [0.0, -5.0, -60.0])
def test_extremes_stay_right(decay, keys):
    """Decays to -60 beside none, keys all equal or all positive, beta 2: float32 against the float64 definition."""
    T = 200
    x = inputs(T, "delta", "channel", dtype=np.float32)
    g = decay * np.random.default_rng(2).integers(0, 2, (B, T, H, K))
    k = {"random": x["k"], "equal": np.ones((B, T, H, K)), "positive": np.abs(x["k"])}[keys]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    x |= {"log_decay": jnp.asarray(g, jnp.float32), "k": jnp.asarray(k, jnp.float32)}
    x["beta"] = jnp.full((B, T, H), 2, jnp.float32) if keys != "random" else x["beta"]
    ours = run(x, "chunked")
    with jax.enable_x64(True):  # of the very same numbers
        reference = run({name: jnp.asarray(value, jnp.float64) for name, value in x.items()}, "naive")
    assert worst(reference, ours) < 1e-4


RATIOS = {"linear": (0.005, 0.005), "delta": (0.006, 0.02)}  # outputs, gradients: fla's own, by RMSE over RMS


@pytest.mark.parametrize(("family", "decay"), KINDS)
def test_bfloat16_within_fla_ratios(family, decay):
    x = {n: a for n, a in inputs(100, family, decay, dtype=np.float32).items() if a is not None}
    half = {n: a.astype(jnp.bfloat16) if n in "qkv" else a for n, a in x.items()}
    exact = x | {n: half[n].astype(jnp.float32) for n in "qkv"}
    reference, ours = run(exact, "naive"), run(half, "chunked")
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == jnp.float32
    out, grad = RATIOS[family]
    assert worst(reference[:2], ours[:2]) < out
    assert worst(reference[2:], ours[2:]) < grad


def test_micro_steps(float64):
    """Two updates a token, as Gated DeltaProduct makes them, against a literal loop."""
    T = 21
    a, b = inputs(T, "delta", "head"), inputs(T, "delta", "none", seed=5)
    pos = jnp.where(jnp.arange(T) < 9, jnp.arange(T), jnp.arange(T) - 9)[None].repeat(B, 0).astype(jnp.int32)
    steps = [(x["k"], x["beta"][..., None] * x["v"], x["beta"][..., None] * x["k"]) for x in (a, b)]
    zeros = jnp.zeros_like(a["log_decay"])
    y, state = micro_steps(a["q"], [(*steps[0], a["log_decay"]), (*steps[1], zeros)], pos, chunk=16)
    S, expected = np.zeros((B, H, K, V)), []
    for t in range(T):
        S = S * (t != 9) * np.exp(np.asarray(a["log_decay"]))[:, t, :, None, None]
        for k, w, r in (tuple(np.asarray(z)[:, t] for z in step) for step in steps):
            S = S + k[..., None] * (w - np.einsum("bhk,bhkv->bhv", r, S))[..., None, :]
        expected.append(np.einsum("bhk,bhkv->bhv", np.asarray(a["q"])[:, t], S))
    np.testing.assert_allclose(y, np.stack(expected, 1), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(state, S, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("C", [1, 10, 16, 48, 64])
def test_triangular_inverse(float64, C):
    L = jnp.tril(jnp.asarray(np.random.default_rng(0).normal(size=(3, C, C))), -1) * 0.3
    Y = jnp.asarray(np.random.default_rng(1).normal(size=(3, C, 5)))
    exact = np.linalg.inv(np.eye(C) + np.asarray(L))
    np.testing.assert_allclose(unit_lower_inverse(L), exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(solve_unit_lower(L, Y), exact @ np.asarray(Y), rtol=1e-9, atol=1e-9)


def test_triangular_gradients(float64):
    L = jnp.tril(jnp.asarray(np.random.default_rng(0).normal(size=(8, 8))), -1)
    Y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)))

    def exact(L, Y):
        return jnp.sum(jnp.sin(jnp.linalg.inv(jnp.eye(8) + jnp.tril(L, -1)) @ Y))

    expected = jax.grad(exact, (0, 1))(L, Y)
    for function in (solve_unit_lower, lambda L, Y: unit_lower_inverse(L) @ Y):
        found = jax.grad(lambda L, Y, f=function: jnp.sum(jnp.sin(f(L, Y))), (0, 1))(L, Y)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_equal_keys_do_not_explode():
    """What the product (I + N)(I + N²)… turns into 1e9: a run of one token at beta 1.9."""
    C = 64
    L = jnp.tril(jnp.full((C, C), 1.9, jnp.float32), -1)
    exact = np.linalg.inv(np.eye(C) + np.asarray(L, np.float64))
    for found in (unit_lower_inverse(L), solve_unit_lower(L, jnp.eye(C, dtype=jnp.float32))):
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-5


@pytest.mark.parametrize("C", [12, 16])
def test_pairs_never_overflow(C):
    rng = np.random.default_rng(0)
    g = -60.0 * rng.integers(0, 2, (C, 4))
    G = jnp.asarray(np.cumsum(g, 0), jnp.float32)
    x, k = (jnp.asarray(rng.normal(size=(C, 4)), jnp.float32) for _ in range(2))
    gap = np.asarray(G, np.float64)[:, None] - np.asarray(G, np.float64)[None]
    exact = np.tril(np.einsum("id,jd,ijd->ij", x, k, np.exp(np.minimum(gap, 0))))
    inclusive, strict = decayed_products([Rows(x, G, True), Rows(x, G, False)], k, G)
    np.testing.assert_allclose(inclusive, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(strict, np.tril(exact, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "decay"), [("linear", "channel"), ("delta", "head")])
def test_program_and_memory_do_not_grow_with_time(family, decay):
    """The program is as long at 4 T; temporary memory grows linearly, and below the inputs, outputs and gradients."""
    sizes, programs, temporary = [], [], []
    small = {n: a for n, a in inputs(8, family, decay, dtype=np.float32).items() if a is not None and n != "state"}
    for T in (2048, 8192):
        x = {n: jax.ShapeDtypeStruct((a.shape[0], T, *a.shape[2:]), a.dtype) for n, a in small.items()}

        def loss(x):
            args = [x["q"], x["k"], x["v"]] + ([x["beta"]] if "beta" in x else [])
            y, _ = (delta_recurrence if "beta" in x else linear_recurrence)(*args, x["log_decay"])
            return jnp.sum(y**2)

        lowered = jax.jit(jax.value_and_grad(loss)).lower(x)
        programs.append(len(lowered.as_text()))
        memory = lowered.compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        sizes.append(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    assert programs[1] < 1.1 * programs[0]
    assert temporary[1] < 4.4 * temporary[0]
    assert temporary[1] < 1.5 * sizes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": jnp.zeros((B, 9, H))}, "log_decay is"),
        ({"implementation": "fast"}, "choose naive"),
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_errors(change, message):
    x = inputs(8, "linear", "none", dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        linear_recurrence(x["q"], x["k"], x["v"], **change)

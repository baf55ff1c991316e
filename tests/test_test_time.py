"""Test-time memory: the dual and the materialised form against the definition, in float64, with gradients."""

import functools
import warnings

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx
from jax import Array

from layers.layer import Tokens
from layers.ops import chunk_tables, test_time
from layers.ops import fast_weights as fw
from layers.ops.recurrence import recurrence
from layers.ops.test_time import Gate, Rule, State, Token, _dual, _materialised, test_time_memory
from layers.test_time import TestTimeMemory, Unstable
from layers.titans import Titans

test_time_memory.__test__ = TestTimeMemory.__test__ = False  # they are no tests
B, H, K, F = 2, 2, 6, 8
NETWORKS = {
    "linear": (fw.network("mlp", 1), fw.sizes("mlp", K, K, F, 1), False),
    "mlp": (fw.network("mlp", 2), fw.sizes("mlp", K, K, F, 2), True),
    "deep": (fw.network("mlp", 3, True), fw.sizes("mlp", K, K, F, 3, True), True),
    "swiglu": (fw.swiglu, fw.sizes("swiglu", K, K, F), False),
}
SLOPES = {
    "l2": fw.l2,
    "dot": fw.dot,
    "huber_norm": fw.huber_norm,
    "huber_coord": fw.huber_coord,
    "huber_mix": fw.huber_mix,
    "l3": functools.partial(fw.lp, 3.0),
}
RETENTIONS = {
    "kl": functools.partial(fw.kl, 2.0),
    "bounded": functools.partial(fw.bounded, 2.0),
    "lq_printed": functools.partial(fw.lq_printed, 4.0),
    "lq_mirror": functools.partial(fw.lq_mirror, 4.0),
    "elastic": functools.partial(fw.elastic, 0.05),
}


class Case:
    """Inputs of a memory, and the loss that weighs y and the state, each number by its own."""

    def __init__(
        self, T, network="mlp", slope="l2", *, momentum=True, keep=True, width="one", seed=0, average=False, **rule
    ):
        memory, self.shapes, norm = NETWORKS[network]
        self.rule = Rule(memory, SLOPES[slope], average=average, **rule)
        rng = np.random.default_rng(seed)

        def gate(outputs):
            g = outputs if width == "outputs" else 1

            def log(x):
                return jnp.asarray(np.log(x))

            return Gate(
                jnp.asarray(rng.uniform(0.02, 0.2, (B, T, H, g))),
                log(rng.uniform(0.7, 1, (B, T, H, g))) if keep and not average else None,
                log(rng.uniform(0.2, 0.9, (B, T, H, 1))) if momentum and not average else None,
            )

        k = rng.normal(size=(B, T, H, K))
        self.arrays = {
            "q": jnp.asarray(rng.normal(size=(B, T, H, K))),
            "k": jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True)),
            "v": jnp.asarray(rng.normal(size=(B, T, H, K))),
            "gates": {name: gate(outputs) for name, (_, outputs) in self.shapes.items()},
            "start": {name: jnp.asarray(rng.normal(size=(H, *s)) * s[0] ** -0.5) for name, s in self.shapes.items()},
            "outer": {"scale": jnp.asarray(rng.normal(size=(H, K))), "shift": jnp.asarray(rng.normal(size=(H, K)))}
            if norm
            else {},
            "threshold": jnp.asarray(rng.uniform(0.5, 2, (B, T, H, 1))) if "huber" in slope else None,
            "row": jnp.asarray(1 / np.arange(1, self.rule.chunk + 1) + rng.uniform(0, 0.1, (H, self.rule.chunk)))
            if average
            else None,
        }

    def call(self, arrays, pos, state=None, cut=slice(None), **options):
        def part(x):
            return x[:, cut]

        return test_time_memory(
            self.rule,
            part(arrays["q"]),
            part(arrays["k"]),
            part(arrays["v"]),
            jax.tree.map(part, arrays["gates"]),
            (arrays["start"], None),
            arrays["outer"],
            threshold=None if arrays["threshold"] is None else part(arrays["threshold"]),
            row=arrays["row"],
            state=state,
            pos=None if pos is None else part(pos),
            **options,
        )

    def graded(self, pos, weigh_state=1.0, **options):
        """[y, state, gradients]."""

        def loss(arrays):
            y, state = self.call(arrays, pos, **options)
            rng = np.random.default_rng(3)
            y = y if pos is None else jnp.where((pos >= 0)[..., None, None], y, 0)
            total = jnp.sum(y * rng.normal(size=y.shape))
            for leaf in jax.tree.leaves(state):
                total += weigh_state * jnp.sum(leaf * rng.normal(size=leaf.shape))
            return total, (y, state)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.arrays)
        return out, grads


def close(a, b, tolerance=1e-10) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / (np.linalg.norm(np.asarray(y)) + 1e-9)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def documents(T: int) -> Array:
    """A row that goes on in mid-chunk and holds short documents, one on the grid, with padding; and one plain row."""
    pos = np.arange(T)[None].repeat(B, 0)
    pos[0] += 3
    for start in (5, 6, 11, 19):
        pos[0, start:] = np.arange(max(T - start, 0))
    pos[1, 13:] = np.arange(T - 13)
    pos[1, 4:7] = -1
    pos[1, 7:13] -= 3
    pos[:, -2:] = -1
    return jnp.asarray(pos, jnp.int32)


def one_by_one(rule: Rule, state: State, x: Token, row, outer) -> tuple[State, Array]:
    """A chunk of one head by the equations, in a loop of Python: the judge of what works on whole chunks."""
    A, S, anchor = state
    base, ys = anchor or A, []
    W = base if rule.retention is None else jax.tree.map(rule.retention, base)
    for t in range(x.k.shape[0]):
        k, v, q = x.k[t : t + 1], x.v[t : t + 1], x.q[t : t + 1]
        threshold = None if x.threshold is None else x.threshold[t : t + 1]
        answer, back = jax.vjp(lambda W, k=k: rule.memory(lambda n, z: z @ W[n], k, outer), W)
        slope, before, A = back(rule.slope(answer, v, threshold))[0], A, dict(A)
        S = None if S is None else dict(S)
        for name, gate in x.gates.items():
            lr, apply = gate.lr[t : t + 1], gate.apply[t : t + 1]
            U = -lr * slope[name]
            if S is not None:
                U = S[name] = U + (S[name] if rule.average else jnp.exp(gate.log_momentum[t : t + 1]) * S[name])
            if rule.average:
                A[name] = base[name] + row[t] * U
                continue
            U = U if rule.step is None else rule.step(U)
            keep = 1.0 if gate.log_keep is None else jnp.exp(gate.log_keep[t : t + 1])
            A[name] = keep * A[name] + apply * U
        seen = before if rule.read == "pre" else A
        seen = seen if rule.retention is None else jax.tree.map(rule.retention, seen)
        ys.append(rule.memory(lambda name, z, seen=seen: z @ seen[name], q, outer))
    return State(A, S, anchor), jnp.concatenate(ys)


def judge(engines, tolerance=1e-10, slopes=True, **options) -> None:
    """A chunk of one head that starts with momentum and off its anchor: values, state and, by `slopes`, gradients.

    Never compiled as a whole: the small programs of its operations are shared by all cases.
    """
    case = Case(5, chunk=5, **options)
    rng = np.random.default_rng(8)
    a = jax.tree.map(lambda x: x[0, :, 0], {name: case.arrays[name] for name in ("q", "k", "v", "gates", "threshold")})
    gates = {n: g._replace(apply=jnp.asarray(rng.uniform(0.5, 1, (5, 1)))) for n, g in a["gates"].items()}
    A, S, anchor = ({n: jnp.asarray(rng.normal(size=s)) for n, s in case.shapes.items()} for _ in range(3))
    held = case.rule.average or options.get("momentum", True)
    state = State(A, S if held else None, anchor)
    if case.rule.average:  # a chunk with a token in its first slot starts at its anchor
        state = State(A, jax.tree.map(jnp.zeros_like, A), A)
    outer, row = jax.tree.map(lambda x: x[0], (case.arrays["outer"], case.arrays["row"]))

    def graded(engine):
        def loss(state, x, row, outer):
            state, y = engine(case.rule, state, x, row, outer)
            total, rng = 0.0, np.random.default_rng(3)
            for leaf in jax.tree.leaves((y, state)):
                total += jnp.sum(leaf * rng.normal(size=leaf.shape))
            return total, (y, state)

        args = state, Token(a["q"], a["k"], a["v"], gates, a["threshold"]), row, outer
        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*args) if slopes else loss(*args)

    want = graded(one_by_one)
    for engine in engines:
        close(graded(engine), want, tolerance)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_chunk_is_its_tokens(float64, network, slope):
    """Every network with every bias, in both forms; gradients of each network and of each bias."""
    judge([_dual, _materialised], slopes=network == "mlp" or slope == "l2", network=network, slope=slope)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": False},
        {"keep": False},
        {"momentum": False, "keep": False},
        {"width": "outputs"},
        {"read": "pre"},
        {"average": True},
    ],
    ids=str,
)
def test_every_learner(float64, options):
    judge([_dual, _materialised], **options)


@pytest.mark.parametrize("step", [None, fw.newton_schulz], ids=["plain", "orthogonal"])
@pytest.mark.parametrize("retention", [None, *RETENTIONS])
def test_every_retention(float64, retention, step):
    judge([_materialised], 1e-8, retention is None or step is None, retention=RETENTIONS.get(retention), step=step)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("dual", {}),
        ("dual", {"average": True, "read": "pre"}),
        ("materialised", {"chunk": 1, "momentum": False}),
    ],
    ids=str,
)
def test_chunks_of_documents_are_the_definition(float64, engine, options):
    """Packed documents, starts on and off the grid, a row that goes on in mid-chunk, padding; with gradients."""
    case, pos = Case(23, **{"chunk": 4} | options), documents(23)
    close(case.graded(pos, implementation=engine), case.graded(pos, implementation="naive"))


@pytest.mark.parametrize("options", [{}, {"average": True}], ids=str)
def test_any_cut_of_time(float64, options):
    """Whole, ragged, one by one: the same y and the same state, from a state that another row left."""
    T = 29
    case, pos = Case(T, chunk=4, **options), documents(T)
    _, warm = case.call(
        case.arrays, jnp.maximum(documents(T), 0)[:, :3] * 0 + jnp.arange(3, dtype=jnp.int32)[None], cut=slice(0, 3)
    )
    call = jax.jit(lambda arrays, pos, state: case.call(arrays, pos, state))
    whole, end = call(case.arrays, pos, warm)

    @functools.partial(jax.jit, static_argnums=3)
    def piece(start, state, arrays, n):
        timed = {name: arrays[name] for name in ("q", "k", "v", "gates", "threshold")} | {"pos": pos}
        cut = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, n, 1), timed)
        return case.call(arrays | cut, cut["pos"], state)

    for cuts in ([0, 7, 14, 21, 22, 29], range(T + 1)):
        state, ys = warm, []
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            y, state = piece(a, state, case.arrays, b - a)
            ys.append(y)
        y = jnp.concatenate(ys, 1)
        live = (np.asarray(pos) >= 0)[..., None, None]
        close([jnp.where(live, y, 0), state], [jnp.where(live, whole, 0), end])


def test_more_documents_than_chunks_foreseen(float64):
    """So many short documents that the layout does not hold them: the definition takes over, under one program."""
    T = 60
    case = Case(T, chunk=16)
    tiny = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) % 3, (B, T))
    usual = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) % 37, (B, T))
    run = jax.jit(lambda pos: case.call(case.arrays, pos))
    judge_ = jax.jit(lambda pos: case.call(case.arrays, pos, implementation="naive"))
    for pos in (tiny, usual):
        close(run(pos), judge_(pos))


def test_what_is_recomputed_changes_nothing(float64):
    """Nor does a state that nobody wants."""
    case = Case(72, chunk=4)
    (y, _), grads = case.graded(None, weigh_state=0.0, remat="none")
    (got, state), got_grads = case.graded(None, weigh_state=0.0, remat="both", wanted=False)
    assert state is None
    close([got, got_grads], [y, grads])


def test_linear_memories_are_the_house_s_recurrences(float64):
    """Online L2 descent is the delta rule that erases before the decay; the dot loss is linear attention at any C."""
    T = 20
    pos = documents(T)
    for slope, chunk in (("l2", 1), ("dot", 4)):
        case = Case(T, "linear", slope, chunk=chunk, momentum=False)
        a, gate = case.arrays, case.arrays["gates"]["w0"]
        zero = a | {"start": jax.tree.map(jnp.zeros_like, a["start"])}
        y, state = case.call(zero, pos)
        want, memory = recurrence(
            *(a["q"], a["k"], gate.lr * a["v"], gate.lr * a["k"] if slope == "l2" else None, gate.log_keep[..., 0]),
            state=jnp.zeros((B, H, K, K)),
            pos=pos,
            erase="undecayed",
        )
        live = (np.asarray(pos) >= 0)[..., None, None]
        close([jnp.where(live, y, 0), state.weights["w0"]], [jnp.where(live, want, 0), memory])


@pytest.mark.parametrize("slope", ["l2", "l3", "dot"])
def test_slopes_are_of_the_losses_they_name(float64, slope):
    losses = {
        "l2": lambda y, v: jnp.sum((y - v) ** 2) / 2,
        "l3": lambda y, v: jnp.sum(jnp.abs(y - v) ** 3),
        "dot": lambda y, v: -jnp.sum(y * v),
    }
    y, v = np.random.default_rng(0).normal(size=(2, 1, 50)) * 3
    close(SLOPES[slope](y, v, None), jax.grad(losses[slope])(y, v), 1e-2 if slope == "l3" else 1e-12)


def test_huber_is_l2_within_its_threshold_and_bounded_beyond(float64):
    y, v = np.random.default_rng(0).normal(size=(2, 7, 5))
    far, near = jnp.full((7, 1), 1e9), jnp.full((7, 1), 0.1)
    for slope in (fw.huber_norm, fw.huber_coord, fw.huber_mix):
        close(slope(y, v, far), y - v)
    assert (jnp.linalg.norm(fw.huber_norm(y, v, near), axis=-1) <= 0.1 + 1e-12).all()
    assert (jnp.abs(fw.huber_coord(y, v, near)) <= 0.1).all() and (jnp.abs(fw.huber_mix(y, v, near)) <= 0.1).all()


def test_retentions_by_their_definitions(float64):
    """A simplex; the mirror map is the slope of half the squared norm; the printed one shrinks as A grows."""
    A = np.random.default_rng(0).normal(size=(6, 4))
    close(fw.kl(2.0, A).sum(0), np.full(4, 2.0))
    close(fw.lq_mirror(4.0, A), jax.grad(lambda A: jnp.sum(A**4) ** 0.5 / 2)(A), 1e-5)
    close(fw.lq_printed(4.0, 2 * A), fw.lq_printed(4.0, A) / 2, 1e-5)
    close(fw.elastic(0.5, A), np.sign(A) * np.maximum(np.abs(A) - 0.5, 0))
    singular = jnp.linalg.svd(fw.newton_schulz(A), compute_uv=False)
    assert (0.6 < singular).all() and (singular < 1.3).all()


def test_a_key_that_repeats_stays_bounded():
    """8,192 times the same token through the layer as it comes; and beyond the stable range there is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = Titans(H=2).build(32, rngs=nnx.Rngs(0))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 1, 32)), (1, 8192, 32))
    tokens = Tokens(jnp.zeros((1, 8192), jnp.int32), jnp.arange(8192, dtype=jnp.int32)[None])
    y = jax.jit(lambda layer, x: layer(x, tokens).y_BTD)(layer, x)
    assert jnp.isfinite(y).all() and jnp.abs(y).max() < 30
    with pytest.warns(Unstable, match="lr_max / \\(1 - momentum_max\\) is 16"):
        Titans(lr_max=0.1)
    with pytest.warns(Unstable, match="0.125 is safe"):
        Titans(lr_max=1.0, momentum=False)


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "head", "loss": "huber_coord"},
        {"memory": "swiglu", "norm": False, "gate": False, "loss": "huber_mix"},
        {"depth": 1, "norm": False, "loss": "dot", "persistent": 2},
        {"loss": "lp", "power": 2.5, "retention": "lq_printed", "momentum": False, "keep": False},
        {"retention": "lq_mirror", "power_q": 3.0, "gates": "output", "rank": 2},
        {"retention": "kl", "step": "orthogonal", "conv": 0},
        {"retention": "elastic", "scale": 0.1, "depth": 3, "remat": "none"},
    ],
    ids=str,
)
def test_every_word_of_a_config(float64, options):
    """Each is built and read, the chunks as the definition."""
    x = jax.random.normal(jax.random.key(1), (1, 11, 16), jnp.float64)
    tokens = Tokens(jnp.zeros((1, 11), jnp.int32), jnp.arange(11, dtype=jnp.int32)[None])

    def answer(**words):
        layer = TestTimeMemory(H=2, F=6, chunk=4, **words).build(16, rngs=nnx.Rngs(0))
        return jax.jit(lambda layer, x: layer(x, tokens).y_BTD)(layer, x)

    y = answer(**options, implementation="chunked")
    close(y, answer(**options, implementation="naive"))
    assert jnp.isfinite(y).all() and jnp.abs(y).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l1"}, "loss is 'l1': it must be one of l2, dot"),
        ({"momentum_max": 1.0}, "momentum_max"),
        ({"lr_max": 0.0}, "lr_max"),
        ({"persistent": -1}, "persistent"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=f"TestTimeMemory.{message}|TestTimeMemory.*{message}"):
        TestTimeMemory(**change)


def late(gate, pre):
    return chunk_tables.fading(gate, True)


def forgetful(gate, pre):
    return chunk_tables.fading(gate, pre)._replace(past=None)


@pytest.mark.parametrize("broken", [late, forgetful])
def test_a_broken_table_is_seen(float64, monkeypatch, broken):
    """Reads one step late; leaves out the momentum with which the chunk began."""
    monkeypatch.setattr(test_time, "fading", broken)
    with pytest.raises(AssertionError):
        judge([_dual])


@pytest.mark.parametrize(
    ("law", "F", "broken"),
    [
        ("a_document_forgets", 10, lambda turn, state, starts_B, boundary_B: turn(state, starts_B & False, boundary_B)),
        ("any_cut_of_time", 11, lambda turn, state, starts_B, boundary_B: turn(state, starts_B, boundary_B & False)),
    ],
    ids=["starts are passed over", "the anchor stays behind"],
)
def test_a_broken_memory_breaks_a_law(monkeypatch, law, F, broken):
    """An F of its own each: what is compiled for a layer is shared by whoever has its config."""
    turn = test_time._turn

    def turned(rule, state, begin, starts_B, boundary_B):
        return broken(lambda *a: turn(rule, a[0], begin, *a[1:]), state, starts_B, boundary_B)

    monkeypatch.setattr(test_time, "_turn", turned)
    with pytest.raises(AssertionError):
        laws.LAWS[law](Titans(H=2, K=8, F=F, chunk=4))


def test_a_chunk_is_not_a_token(float64):
    """With C > 1 another function than online descent: further from it, in proportion, the larger the steps are."""
    distance = {}
    for scale in (1 / 32, 1 / 64, 1 / 128):
        ys = []
        for chunk in (1, 8):
            case = Case(32, chunk=chunk)
            gates = {name: gate._replace(lr=gate.lr * scale) for name, gate in case.arrays["gates"].items()}
            ys.append(case.call(case.arrays | {"gates": gates}, None)[0])
        distance[scale] = float(jnp.linalg.norm(ys[0] - ys[1]))
    large, half, quarter = distance.values()
    assert large > 1e-3
    assert 1.8 < large / half < 4.5 and 1.8 < half / quarter < 4.5


def test_a_document_starts_where_it_is_told():
    """Weights and momentum of the start are those of every document."""
    case = Case(4, chunk=2)
    start = case.arrays["start"], jax.tree.map(jnp.ones_like, case.arrays["start"])
    x = {name: case.arrays[name].astype(jnp.float32) for name in "qkv"}
    y, state = test_time_memory(
        case.rule, x["q"], x["k"], x["v"], case.arrays["gates"], start, case.arrays["outer"], pos=jnp.full((B, 4), -1)
    )
    assert isinstance(state, State) and y.shape == (B, 4, H, K)
    for name, w in case.arrays["start"].items():
        np.testing.assert_array_equal(state.weights[name][1], w)
        assert (state.momentum[name] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "naive, dual"),
        ({"row": jnp.ones((H, 4))}, "average"),
        ({"state": State({}, None, None)}, "`pos`"),
    ],
)
def test_bad_calls(change, message):
    case = Case(4, chunk=4)
    with pytest.raises(ValueError, match=message):
        test_time_memory(
            case.rule, *(case.arrays[n] for n in "qkv"), case.arrays["gates"], (case.arrays["start"], None), **change
        )

"""The language model: one model however its stages are run, its loss against NumPy, its parameters by name."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from flax import nnx

from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens
from layers.mlp import MLP
from models.lm import LM, Stage
from models.loss import score, score_tokens
from models.parameters import Spec, flatten

B, T, W, D = 2, 7, 40, 16


@dataclasses.dataclass(frozen=True)
class Mean(LayerConfig):
    """The mean of what was read so far, through two maps: a memory that compiles fast."""

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MeanLayer":
        return MeanLayer(D, rngs=rngs)


class MeanState(NamedTuple):
    sum_BHV: jax.Array
    count_B: jax.Array


class MeanLayer(Layer):
    def __init__(self, D: int, *, rngs: nnx.Rngs):
        self.value = Einsum("BTD,DHV->BTHV", D=D, H=2, V=D // 2, rngs=rngs)
        self.out = Einsum("BTHV,HVD->BTD", D=D, H=2, V=D // 2, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> MeanState:
        return MeanState(jnp.zeros((B, 2, D // 2), jnp.float32), jnp.zeros(B, jnp.int32))

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, state: Any = None) -> Out:
        B, T, _ = x_BTD.shape
        v_BTHV = self.value(x_BTD)
        start = self.init_state(B, T) if state is None else state
        sum_BTHV = jnp.cumsum(v_BTHV, 1) + start.sum_BHV[:, None].astype(v_BTHV.dtype)
        count_BT = start.count_B[:, None] + jnp.arange(1, T + 1, dtype=jnp.int32)[None]
        y_BTD = self.out(sum_BTHV / count_BT[..., None, None].astype(v_BTHV.dtype))
        new = MeanState(sum_BTHV[:, -1].astype(jnp.float32), count_BT[:, -1].astype(jnp.int32))
        return Out(y_BTD, None if state is None else new, {"size": jnp.mean(y_BTD**2)})


ONCE, REPEATED = Stage((MLP(F=24),)), Stage((Mean(), MLP(F=24)), repeats=2)
CONFIG = LM(W=W, D=D, stages=(ONCE, REPEATED), scan_layers="never")
TOKENS = Tokens(
    np.random.default_rng(0).integers(0, W, (B, T), np.int32),
    np.tile(np.arange(T, dtype=np.int32), (B, 1)),
)


def structure_of(config):
    return flatten(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1]


@functools.cache
def initial():
    with jax.enable_x64(False):
        params = jax.jit(lambda: flatten(CONFIG.build(rngs=nnx.Rngs(0)))[0])()
    return {name: np.asarray(value) for name, value in params.items()}


@functools.cache
def params64():
    """In double precision, with a head that says something (it starts at zero)."""
    head = np.random.default_rng(1).normal(size=(W, D)) * 0.3
    return {name: value.astype(np.float64) for name, value in initial().items()} | {"head": head}


@functools.cache
def passed(unstacked=False, **changes):
    """All there is to compare: logits, gradients, and logits and state of the same tokens read with a state."""
    config = dataclasses.replace(CONFIG, **changes)
    structure = structure_of(config)
    weight = np.random.default_rng(2).normal(size=(B, T, W))

    def run(params, tokens):
        def objective(params):
            model = structure.module(params)
            model = model.unstacked() if unstacked else model
            out = model(tokens)
            return jnp.sum(jax.nn.log_softmax(out.y_BTD) * weight), (out.y_BTD, model)

        grads, (logits, model) = jax.grad(objective, has_aux=True)(params)
        out = model(tokens, model.init_state(B, T))
        return logits, grads, out.y_BTD, out.state, {name: jnp.sum(value) for name, value in out.aux.items()}

    with x64():
        return jax.tree.map(np.asarray, jax.jit(run)(params64(), TOKENS))


VARIANTS = {
    "scan": {"scan_layers": "always"},
    "apart": {"unstacked": True},
    "scan, blocks recomputed": {"scan_layers": "always", "remat": "block"},
    "all but products recomputed": {"remat": "dots"},
    "scan, products on the host": {"scan_layers": "always", "remat": "offload"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_model_however_it_is_run(name):
    *expected, plain = passed()
    *found, said = passed(**VARIANTS[name])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # The state is float32, the rest is double.
        tolerance = 1e-6 if b.dtype == np.float32 or path[0].idx == 2 else 1e-11
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))
    assert all(np.abs(g).max() > 0 for g in expected[1].values())
    assert plain.keys() == {"1.0.0/size", "1.1.0/size"}
    scanned = {"1.*.0/size": plain["1.0.0/size"] + plain["1.1.0/size"]}
    expected = scanned if "scan" in name else plain
    assert said.keys() == expected.keys()
    for aux, value in expected.items():
        assert float(said[aux]) == pytest.approx(float(value), rel=1e-6)


def test_with_a_state_or_without():
    logits, _, logits_with_state, state, _ = passed()
    assert all((layer.count_B == T).all() for repeat in state[1] for layer in repeat if layer)
    np.testing.assert_allclose(logits_with_state, logits, rtol=1e-5, atol=1e-5)


def test_auto_scans_more_than_eight_repeats():
    def loops(repeats):
        config = LM(W=W, D=D, stages=(Stage((MLP(F=8),), repeats),))
        structure = structure_of(config)
        jaxpr = jax.make_jaxpr(lambda p: structure.module(p)(TOKENS).y_BTD)(
            {name: jnp.zeros(spec.shape) for name, spec in structure.specs.items()}
        )
        return sum(equation.primitive.name == "scan" for equation in jaxpr.eqns)

    assert loops(8) == 0 and loops(9) == 1


def test_the_equation_in_numpy():
    """x = embed(ids) sqrt(D); x += layer(norm(x)); logits = head norm(x), with MLPs alone."""
    config = LM(W=W, D=D, stages=(Stage((MLP(F=24),), 2),), scan_layers="always", softcap=2.0)
    structure, rng = structure_of(config), np.random.default_rng(3)
    p = {name: rng.normal(size=spec.shape) for name, spec in structure.specs.items()}

    def norm(x, w):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * w

    x = p["embed"][TOKENS.ids_BT] * math.sqrt(D)
    for repeat in range(2):
        gate, up, down = (p[f"stages.0.layers.0.{name}.w"][repeat] for name in ("gate", "up", "down"))
        z = norm(x, p["stages.0.norms.0.w"][repeat])
        x = x + ((z @ gate) / (1 + np.exp(-(z @ gate))) * (z @ up)) @ down
    expected = 2 * np.tanh(norm(x, p["norm.w"]) @ p["head"].T / 2)
    with x64():
        found = jax.jit(lambda p, tokens: structure.module(p)(tokens).y_BTD)(p, TOKENS)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_tied_head_is_the_embedding():
    tied = LM(W=W, D=D, stages=(ONCE,), tied=True)
    free = dataclasses.replace(tied, tied=False)
    a, b = structure_of(tied), structure_of(free)
    assert b.specs.keys() - a.specs.keys() == {"head"} and a.specs.keys() <= b.specs.keys()
    with x64():
        params = {name: params64()[name] for name in a.specs}

        def objective(structure, params):
            return jnp.sum(jnp.sin(structure.module(params)(TOKENS).y_BTD))

        value, grads = jax.jit(jax.value_and_grad(functools.partial(objective, a)))(params)
        other, parts = jax.jit(jax.value_and_grad(functools.partial(objective, b)))(params | {"head": params["embed"]})
    np.testing.assert_allclose(value, other, rtol=1e-12)
    np.testing.assert_allclose(grads["embed"], parts["embed"] + parts["head"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, gone", [("0.0.0", [0]), ("1.1.0", [1]), ("1.*.1", [0, 1])])
def test_a_skipped_layer_writes_nothing(name, gone):
    structure = structure_of(CONFIG)
    stage, _, layer = name.split(".")
    out = f"stages.{stage}.layers.{layer}." + ("out.w" if name == "1.1.0" else "down.w")
    silent = params64()[out].copy()
    silent[gone] = 0
    with x64():
        run = jax.jit(lambda p, skip: structure.module(p)(TOKENS, skip=skip).y_BTD, static_argnums=1)
        skipped, silenced = map(np.asarray, (run(params64(), (name,)), run(params64() | {out: silent}, ())))
    np.testing.assert_allclose(skipped, silenced, rtol=1e-12, atol=1e-12)
    assert np.abs(skipped - passed()[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["0.1.0", "1.*.2", "2.0.0", "attention"])
def test_skipping_a_layer_that_is_not_there(name):
    model = jax.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=rf"skip names {re.escape(repr(name))}, .*0\.0\.0, 1.*1\.1\.1"):
        jax.eval_shape(lambda model: model(TOKENS, skip=("0.0.0", name)), model)


def test_bfloat16_computes_near_float32():
    structure = structure_of(dataclasses.replace(CONFIG, dtype="bfloat16", scan_layers="always"))
    params = jax.tree.map(np.float32, params64())

    def objective(params):
        model = structure.module(params)
        out = model.hidden(TOKENS)
        logits = model.logits(out.y_BTD)
        return jnp.mean(jnp.sin(logits)), (out.y_BTD, logits)

    grads, (hidden, logits) = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact = passed()[0]
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in grads.values())


# Initial values


def test_scanned_or_not_starts_the_same():
    def program(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        return str(jax.make_jaxpr(lambda: flatten(config.build(rngs=nnx.Rngs(0)))[0])())

    assert program() == program(scan_layers="always", remat="block") != program(residual_scale=1.0)
    a, b = initial()["stages.1.layers.0.value.w"]
    assert not np.isclose(a, b).any()


def test_initial_scales():
    params = initial()
    assert np.std(params["embed"]) * 4 == pytest.approx(1, rel=0.1)  # times sqrt(D): the stream starts at 1
    assert np.std(params["stages.1.layers.0.value.w"]) * 4 == pytest.approx(1, rel=0.1)
    # Five layers write to the stream.
    assert np.std(params["stages.1.layers.0.out.w"]) * 4 == pytest.approx(5**-0.5, rel=0.1)
    assert np.std(params["stages.1.layers.1.down.w"]) * 24**0.5 == pytest.approx(5**-0.5, rel=0.1)
    assert not params["head"].any()

    @jax.jit
    def written():
        config = LM(W=2, D=4, stages=(Stage((MLP(F=4),), 4),))
        built = [dataclasses.replace(config, residual_scale=s).build(rngs=nnx.Rngs(0)) for s in ("depth", 0.5, 0.1)]
        return [flatten(model)[0]["stages.0.layers.0.down.w"] for model in built]

    depth, half, tenth = written()
    np.testing.assert_array_equal(depth, half)
    np.testing.assert_allclose(tenth, 0.2 * half, rtol=1e-6)


def test_an_untrained_model_knows_nothing():
    tied = structure_of(dataclasses.replace(CONFIG, tied=True))
    hidden, logits, tied_logits = jax.jit(
        lambda p: (
            structure_of(CONFIG).module(p).hidden(TOKENS).y_BTD,
            structure_of(CONFIG).module(p)(TOKENS).y_BTD,
            tied.module(p)(TOKENS).y_BTD,
        )
    )(initial())
    assert np.sqrt(np.mean(np.square(hidden))) == pytest.approx(1, rel=0.01)
    assert not logits.any()  # every word alike
    assert 0.5 < np.std(tied_logits) < 2


# Parameters by name


def test_names_and_specs():
    module = jax.jit(lambda: CONFIG.build(rngs=nnx.Rngs(0)))()
    params, structure = flatten(module)
    value = structure.specs["stages.1.layers.0.value.w"]  # a layer may call a part `value`
    assert value == Spec((2, D, 2, 8), "LDHV", decay=True, residual=False, fan_in="D")
    assert structure.specs["stages.0.layers.0.down.w"].residual
    norm = structure.specs["stages.1.norms.1.w"]
    assert (norm.shape, norm.axes, norm.decay, norm.fan_in) == ((2, D), "LD", False, "")
    assert structure.specs["embed"].axes == structure.specs["head"].axes == "WD"
    assert all(len(spec.axes) == len(spec.shape) == params[name].ndim for name, spec in structure.specs.items())
    assert len(params) == len(jax.tree.leaves(module)) == len(structure.specs)
    again = structure.module(params)
    assert jax.tree.structure(again) == jax.tree.structure(module)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(module), strict=True):
        assert a is b


def test_laid_apart_once_or_twice_is_the_same():
    model = jax.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0)).unstacked())
    again = jax.eval_shape(lambda model: model.unstacked(), model)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    specs = flatten(model)[1].specs
    assert specs["stages.1.1.layers.0.value.w"].axes == "DHV" and specs["stages.0.0.norms.0.w"].shape == (D,)
    stacked = jax.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0)))
    states = [jax.eval_shape(lambda model: model.init_state(3, 9), m) for m in (model, stacked)]
    assert states[0] == states[1] and [len(stage) for stage in states[0]] == [1, 2]


@pytest.mark.parametrize("constant", [np.arange(3), nnx.Variable(np.arange(3))], ids=["array", "variable"])
def test_a_stray_array_is_refused(constant):
    class Stray(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3), axes="D")
            self.table = nnx.data(constant)

    with pytest.raises(TypeError, match="table of Stray is no Param"):
        flatten(Stray())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stage(()), "Stage.pattern is empty"),
        (lambda: Stage((MLP(),), 0), "Stage.repeats is 0"),
        (lambda: LM(W=8, D=8, stages=()), "LM.stages is empty"),
        (lambda: LM(W=0, D=8, stages=(ONCE,)), "LM.W is 0"),
    ],
)
def test_impossible_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The loss

LABELS = np.random.default_rng(4).integers(0, W, (B, 13)).astype(np.int32)
SPARSE = np.where(np.arange(13) % np.array([[4], [5]]) == 2, LABELS, -100)  # 3 labels in each row


def cross_entropy(hidden, head, labels):
    """nll, correct, squared log z, and the gradients of the summed nll, by hand."""
    logits = hidden @ head.T
    top = logits.max(-1, keepdims=True)
    z = np.exp(logits - top).sum(-1)
    log_z, asked = np.log(z) + top[..., 0], labels >= 0
    label = np.where(asked, labels, 0)
    nll = np.where(asked, log_z - np.take_along_axis(logits, label[..., None], -1)[..., 0], 0)
    error = (np.exp(logits - log_z[..., None]) - np.eye(len(head))[label]) * asked[..., None]
    correct = asked & (logits.argmax(-1) == labels)
    return nll, correct, np.where(asked, log_z**2, 0), error @ head, np.einsum("btw,btd->wd", error, hidden)


@pytest.mark.parametrize(
    "options",
    [{}, {"limit": B * W * 5}, {"limit": 1}],
    ids=str,
)
def test_cross_entropy_against_numpy(options):
    structure, rng = structure_of(CONFIG), np.random.default_rng(5)
    hidden, head = rng.normal(size=(B, 13, D)), params64()["head"]

    @jax.jit
    def run(hidden, head, labels):
        def objective(hidden, head):
            scores = score(structure.module(params64() | {"head": head}), hidden, labels, **options)
            return jnp.sum(scores.nll), scores

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, head)

    for labels in (LABELS, SPARSE, np.full_like(LABELS, -100)):
        with x64():
            (total, scores), grads = jax.tree.map(np.asarray, run(hidden, head, labels))
        nll, correct, squared, *expected_grads = cross_entropy(hidden, head, labels)
        np.testing.assert_allclose(total, nll.sum(), rtol=1e-12)
        for found, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        asked = scores.asked > 0
        assert np.array_equal(asked, scores.labels >= 0) and asked.sum() == (labels >= 0).sum()
        for found, expected in ((scores.nll, nll), (scores.correct, correct), (scores.squared_log_z, squared)):
            np.testing.assert_allclose(found[asked], expected[labels >= 0], rtol=1e-12)
            assert not found[~asked].any()


MIXED, PLAIN = (REPEATED, Stage((Mean(), MLP(F=24), MLP(F=8)))), (REPEATED, ONCE)


@pytest.mark.parametrize(
    ("stages", "options"),
    [(MIXED, {}), (PLAIN, {}), (PLAIN[:1], {"remat": "block"}), (PLAIN[:1], {"scan_layers": "always"})],
    ids=["mixer and MLPs", "MLPs alone", "recomputed", "scanned"],
)
def test_asking_at_labelled_places_is_asking_everywhere(stages, options):
    """Scores and gradients of the few labelled places, as of the whole text; with a layer left out as well."""
    structure, rng = structure_of(dataclasses.replace(CONFIG, stages=stages, **options)), np.random.default_rng(6)
    params = {name: rng.normal(size=spec.shape) * 0.3 for name, spec in structure.specs.items()}
    tokens = Tokens(LABELS, np.tile(np.arange(13, dtype=np.int32), (B, 1)))

    def run(params, labelled):
        scores, aux = score_tokens(structure.module(params), tokens, SPARSE, labelled=labelled, skip=("0.*.0",))
        return jnp.sum(scores.nll * scores.labels.astype(scores.nll.dtype)), (scores, aux)

    with x64():
        both = [jax.jit(jax.value_and_grad(lambda p, n=n: run(p, n), has_aux=True))(params) for n in (None, 3)]
    ((total, (_, aux)), grads), ((few_total, (few, few_aux)), few_grads) = jax.tree.map(np.asarray, both)
    assert few.nll.shape == (B, 3) and few.asked.sum() == (SPARSE >= 0).sum() and few_aux.keys() == aux.keys()
    np.testing.assert_allclose(few_total, total, rtol=1e-12)
    for name, grad in grads.items():
        np.testing.assert_allclose(few_grads[name], grad, rtol=1e-9, atol=1e-11, err_msg=name)


def test_places_are_not_for_calls_with_a_state():
    model = CONFIG.build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at_BN"):
        model.hidden(Tokens(*TOKENS), model.init_state(B, T), at_BN=jnp.zeros((B, 1), jnp.int32))


def test_all_logits_are_never_held():
    config = LM(W=512, D=D, stages=(ONCE,))
    structure = structure_of(config)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in structure.specs.items()}
    hidden, labels = jax.ShapeDtypeStruct((2, 129, D), jnp.float32), jax.ShapeDtypeStruct((2, 129), jnp.int32)

    def held(limit):
        def objective(params, hidden, labels):
            return jnp.sum(score(structure.module(params), hidden, labels, limit=limit).nll)

        compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, hidden, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 2 * 129 * 512
    assert held(1 << 24) >= whole and held(8 * 2 * 512) < whole / 3

"""The training step, its optimisers and its count of operations."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens
from layers.mlp import MLP
from layers.ops.chunk_loop import over_chunks
from models.lm import LM, Stage
from models.parameters import flatten
from training.data import DataConfig
from training.experiment import AdamW, Experiment, Muon, Schedule, Train
from training.flops import count_flops
from training.optimizer import Optimizer, build_optimizer, learning_rate
from training.step import DeviceBatch, eval_step, init_state, train_step
from training.summary import flops_per_token

B, T, W, D = 8, 6, 32, 16


@dataclasses.dataclass(frozen=True)
class Talk(LayerConfig):
    """y = sqrt(root) x W, with a loss, a metric and a mask to say. At root 0 the gradient is infinite, the loss not."""

    def build(self, D: int, *, rngs: nnx.Rngs) -> "TalkLayer":
        return TalkLayer(D, rngs=rngs)


class TalkLayer(Layer):
    def __init__(self, D: int, *, rngs: nnx.Rngs):
        self.out = Einsum("BTD,DE->BTE", D=D, E=D, rngs=rngs)
        self.root = nnx.Param(jnp.ones([1]), axes="M", decay=False)

    def init_state(self, B: int, T: int) -> tuple[()]:
        return ()

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, state: Any = None) -> Out:
        y_BTD = self.out(x_BTD) * jnp.sqrt(self.root[...]).astype(x_BTD.dtype)[None, None]
        mask_BT = tokens.pos_BT == 0
        return Out(y_BTD, state, {"loss/size": 0.1 * jnp.mean(y_BTD**2), "mean": jnp.mean(x_BTD), "mask": mask_BT})


MODEL = LM(W=W, D=D, stages=(Stage((Talk(),), repeats=2),))
# An eps that small differences of the gradient do not pass.
ADAM = AdamW(lr=1e-2, eps=1e-3, schedule=Schedule(warmup=0, shape="constant"))
TOKEN_BYTES = np.arange(W, dtype=np.int32) % 3


def batch(seed=0):
    """Row r asks r of its T places: no two parts of the batch ask alike, one row asks nothing."""
    ids, labels = np.random.default_rng(seed).integers(0, W, (2, B, T), np.int32)
    pos = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    pos[3, 2:] -= 2
    return DeviceBatch(ids, pos, np.where(np.arange(T) < np.arange(B)[:, None], labels, -100).astype(np.int32))


def structure_of(model):
    return flatten(jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))))[1]


def drawn(structure, seed=1):
    rng = np.random.default_rng(seed)
    scales = {name: 1 / math.sqrt(spec.shape[-1]) for name, spec in structure.specs.items()}
    return {
        name: (rng.normal(size=spec.shape) * scales[name]).astype(np.float32) for name, spec in structure.specs.items()
    }


@functools.cache
def start():
    params = drawn(structure_of(MODEL))
    return {name: np.abs(value) + 1 if name.endswith("root") else value for name, value in params.items()}


@functools.cache
def job(accumulate=1, **changes):
    """(first state, compiled step)"""
    model = dataclasses.replace(MODEL, **changes)
    train = Train(accumulate=accumulate, ema=0.75, z_loss=0.01, clip=0.5)
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B), optimizer=ADAM, train=train)
    structure = structure_of(model)
    optimizer = build_optimizer(ADAM, train.steps, train.clip, structure.specs)
    step = jax.jit(train_step(experiment, structure, optimizer, TOKEN_BYTES, None))
    return jax.tree.map(np.asarray, init_state(experiment, start(), optimizer)), step


@functools.cache
def stepped(**changes):
    state, step = job(**changes)
    return jax.tree.map(np.asarray, step(state, batch()))


@functools.cache
def forward():
    """Logits and what the layers said, of the first parameters."""
    structure = structure_of(MODEL)
    out = jax.jit(lambda p: structure.module(p)(Tokens(batch().ids_BT, batch().pos_BT)))(start())
    logits = np.asarray(out.y_BTD, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    labels = batch().labels_BT
    nll = log_z - np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return logits, log_z, np.where(labels >= 0, nll, 0), {name: np.asarray(v) for name, v in out.aux.items()}


def test_the_loss_and_the_metrics_by_hand():
    _, metrics = stepped()
    logits, log_z, nll, aux = forward()
    asked, n = batch().labels_BT >= 0, (batch().labels_BT >= 0).sum()
    assert n == 0 + 1 + 2 + 3 + 4 + 5 + 6 + 6
    said = sum(float(value) for name, value in aux.items() if name.endswith("loss/size"))
    assert said > 0.01
    expected = nll.sum() / n + 0.01 * (log_z**2)[asked].mean() + said
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    bytes_ = TOKEN_BYTES[batch().labels_BT[asked]].sum()
    assert metrics["bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / bytes_, rel=1e-5)
    right = (logits.argmax(-1) == batch().labels_BT)[asked].mean()
    assert metrics["accuracy"] == pytest.approx(right, rel=1e-6)
    assert metrics["aux/0.1.0/mean"] == pytest.approx(float(aux["0.1.0/mean"]), rel=1e-4)
    assert not any("mask" in name for name in metrics)  # masks are for probes
    assert (metrics["skipped"], metrics["bad"]) == (0, 0)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_add_up_to_the_batch(accumulate):
    (expected, metrics), (found, said) = stepped(), stepped(accumulate=accumulate)
    assert said.keys() == metrics.keys() and {"loss", "grad_norm"} <= metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(said[name], metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)
    for name, value in expected["params"].items():
        moved = np.abs(value - start()[name]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(found["params"][name], value, rtol=0, atol=1e-4 * moved, err_msg=name)


def test_scanned_layers_add_the_same_losses():
    (_, plain), (_, scanned) = stepped(), stepped(scan_layers="always")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(scanned[name], plain[name], rtol=1e-5)
    both = plain["aux/0.0.0/loss/size"] + plain["aux/0.1.0/loss/size"]
    np.testing.assert_allclose(scanned["aux/0.*.0/loss/size"], both, rtol=1e-5)


def test_the_average_follows():
    state, _ = stepped()
    for name, value in state["params"].items():
        np.testing.assert_allclose(state["ema"][name], 0.75 * start()[name] + 0.25 * value, rtol=1e-6, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing():
    first, step = job()
    infinite = first["params"]["embed"].copy()
    infinite[batch().ids_BT[7, 0]] = np.inf
    for broken in ({"embed": infinite}, {"stages.0.layers.0.root": np.zeros([2, 1], np.float32)}):
        state = first | {"params": first["params"] | broken}
        kept = state
        for bad in (1, 2):
            state, metrics = jax.tree.map(np.asarray, step(state, batch()))
            assert (metrics["bad"], metrics["skipped"]) == (bad, bad)
            assert np.isfinite(metrics["loss"]) == ("embed" not in broken)
            assert not np.isfinite(metrics["grad_norm"])
        for group in ("params", "opt", "ema"):
            jax.tree.map(np.testing.assert_array_equal, state[group], kept[group])
        assert state["counters"] == {"step": 2, "skipped": 2, "bad": 2}
        state, metrics = step(state | {"params": first["params"]}, batch())
        assert (int(metrics["bad"]), int(metrics["skipped"])) == (0, 2) and int(state["counters"]["step"]) == 3
        jax.tree.map(np.testing.assert_array_equal, state["params"], stepped()[0]["params"])


def test_a_batch_that_asks_nothing_is_no_accident():
    first, step = job()
    state, metrics = step(first, batch()._replace(labels_BT=np.full((B, T), -100, np.int32)))
    assert int(metrics["bad"]) == 0 and float(metrics["accuracy"]) == float(metrics["bits_per_byte"]) == 0
    assert all(np.isfinite(value).all() for value in state["params"].values())


def test_bfloat16_steps():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B))
    optimizer = Optimizer(*optax.sgd(1.0))
    step = train_step(experiment, structure_of(model), optimizer, TOKEN_BYTES, None)
    state = jax.eval_shape(lambda: init_state(experiment, start(), optimizer))
    after, metrics = jax.eval_shape(step, state, batch())
    assert after == state and metrics["aux/0.0.0/loss/size"].dtype == jnp.float32


def test_evaluation_sums_by_position():
    structure = structure_of(MODEL)
    logits, _, nll, _ = forward()
    found = jax.jit(eval_step(structure, TOKEN_BYTES))(start(), batch())
    labels = batch().labels_BT
    asked = labels >= 0
    np.testing.assert_allclose(found["nll"], nll.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(found["asked"], asked.sum(0))
    np.testing.assert_array_equal(found["correct"], ((logits.argmax(-1) == labels) & asked).sum(0))
    np.testing.assert_array_equal(found["bytes"], (TOKEN_BYTES[np.maximum(labels, 0)] * asked).sum(0))
    with pytest.raises(ValueError, match="skip names '3.0.0'"):
        jax.eval_shape(eval_step(structure, TOKEN_BYTES, skip=("3.0.0",)), start(), batch())
    few = jax.eval_shape(eval_step(structure, TOKEN_BYTES, labelled=4, skip=("0.*.0",)), start(), batch())
    assert few["nll"].shape == (4,)


# Optimisers

RICH = LM(
    W=W, D=D, stages=(Stage((GatedDeltaNet(H=2, K=4, V=8), Attention(H=2, qk_norm=True, bias=True), MLP(F=24)), 2),)
)
CONSTANT = Schedule(warmup=0, shape="constant")
OPTIMIZERS = [
    AdamW(lr=0.1, weight_decay=0.5, schedule=CONSTANT),
    Muon(lr=0.1, adam_lr=0.03, weight_decay=0.5, schedule=CONSTANT),
]


@functools.cache
def one_step(config, clip=None, model=RICH):
    """(grads, params) -> (updates, state) of a first step."""
    optimizer = build_optimizer(config, 100, clip, structure_of(model).specs)
    run = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))
    return lambda grads, params: jax.tree.map(np.asarray, run(grads, params))


def decayed(config, spec):
    """What weight decay takes of a parameter in a step, by the docs of AdamW and Muon."""
    adam = isinstance(config, AdamW) or spec.fan_in
    return 0.5 * (config.lr if adam else config.adam_lr) if spec.decay else 0.0


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: type(c).__name__)
def test_weight_decay_spares_what_asks_for_it(config):
    specs = structure_of(RICH).specs
    params = drawn(structure_of(RICH))
    updates, _ = one_step(config)(jax.tree.map(np.zeros_like, params), params)
    spared = {name for name, spec in specs.items() if not spec.decay}
    endings = {name.split(".")[-1] for name in spared}
    assert {"A_log", "dt_bias", "b"} <= endings and {"norm.w", "stages.0.norms.2.w"} <= spared
    for name, update in updates.items():
        expected = -decayed(config, specs[name]) * params[name]
        assert expected.any() == (name not in spared)
        np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0, err_msg=name)


def test_muon_trains_matrices_and_adam_the_rest():
    specs = structure_of(RICH).specs
    grads, params = drawn(structure_of(RICH), 2), drawn(structure_of(RICH))
    updates, state = one_step(OPTIMIZERS[1])(grads, params)
    held = {path[-1].key for path, leaf in jax.tree.leaves_with_path(state.inner_states["muon"]) if leaf.ndim > 1}
    matrices = {name for name, spec in specs.items() if spec.fan_in}
    assert held == matrices and len(matrices) == 7 + 4 + 3
    assert not {name for name in matrices if "norm" in name or "conv" in name or name in ("embed", "head")}
    for name, update in updates.items():
        update = update + decayed(OPTIMIZERS[1], specs[name]) * params[name]
        assert np.vdot(update, grads[name]) < 0
        if name not in matrices:
            np.testing.assert_allclose(np.abs(update), 0.03, rtol=1e-3, err_msg=name)  # Adam's first step
            continue
        # Each layer's matrix apart, all its singular values near one size: what Newton-Schulz makes of any matrix.
        inputs = math.prod(
            n for letter, n in zip(specs[name].axes, specs[name].shape, strict=True) if letter in specs[name].fan_in
        )
        for layer in update:
            matrix = layer.reshape(inputs, -1)  # the inputs come first in all of these
            assert specs[name].axes[1:].startswith(specs[name].fan_in)
            sizes = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * math.sqrt(max(matrix.shape)))
            assert 0.3 < sizes.min() and sizes.max() < 1.3, (name, sizes)


def test_the_gradient_is_clipped_before_the_moments():
    grads, params = drawn(structure_of(MODEL), 2), drawn(structure_of(MODEL))
    for clip, norm in ((0.25, 0.25), (1e6, float(optax.tree.norm(grads)))):
        _, state = one_step(AdamW(b1=0.75), clip, MODEL)(grads, params)
        assert float(optax.tree.norm(state[1][0].mu)) == pytest.approx(0.25 * norm, rel=1e-5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(10, "cosine", final=0.1), {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1, 60: 0.55, 110: 0.1, 500: 0.1}),
        (Schedule(0, "cosine", final=0.0), {0: 1, 55: 0.5, 110: 0}),
        (Schedule(10, "wsd", final=0.2, decay=0.5), {0: 1 / 11, 10: 1, 55: 1, 66: 0.84, 110: 0.2, 200: 0.2}),
        (Schedule(60, "wsd", final=0.0, decay=0.9), {59: 60 / 61, 60: 1, 85: 0.5, 110: 0}),
        (Schedule(10, "constant"), {0: 1 / 11, 10: 1, 110: 1}),
        (Schedule(1000, "constant"), {0: 1 / 111, 109: 110 / 111}),
    ],
    ids=str,
)
def test_schedules_by_numbers(schedule, expected):
    rate = learning_rate(2.0, schedule, 110)
    for step, factor in expected.items():
        assert float(rate(step)) == pytest.approx(2 * factor, rel=1e-5, abs=1e-7), step


# Operations


def test_operations_by_hand():
    a, w, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 4), (5, 4, 4), (2, 4, 7)))

    def loop(a, w):
        return jax.lax.scan(lambda a, w: (jax.nn.relu(a @ w), None), a, w)[0]

    product = 2 * 3 * 4 * 4
    assert count_flops(loop, a, w) == 5 * product
    assert count_flops(jax.jit(jax.checkpoint(loop)), a, w) == 5 * product
    assert count_flops(lambda a, w: jax.lax.map(lambda _: loop(a, w), jnp.arange(7)), a, w) == 7 * 5 * product
    assert count_flops(lambda a, b: jnp.einsum("ij,njk->nik", a, b), a, b) == 2 * 2 * 3 * 4 * 7
    branches = (lambda a, w: a, lambda a, w: a @ w[0])
    assert count_flops(lambda a, w: jax.lax.cond(a[0, 0] > 0, *branches, a, w), a, w) == product
    assert count_flops(lambda a, w: a + jnp.exp(w[0, :3]), a, w) == 0


def test_operations_of_a_loop_as_long_as_the_data():
    """Ten tokens in chunks of four, and within each chunk in chunks of two: three turns, and two in each."""
    x, pos, w = jnp.ones((1, 10, 4)), jnp.arange(10, dtype=jnp.int32)[None], jnp.ones((4, 4))

    def inner(w, state, x, pos):
        return state, x @ w

    def outer(w, state, x, pos):
        y, state = over_chunks(inner, w, state, x, pos, 2, most=2)
        return state, y

    def read(w, x, pos):
        return over_chunks(outer, w, (), x, pos, 4)[0]

    assert count_flops(jax.vmap(read, (None, 0, 0)), w, x[None], pos[None]) == 3 * 2 * (2 * 2 * 4 * 4)
    np.testing.assert_allclose(read(w, x, pos), x @ w)


@pytest.mark.parametrize("scan_layers", ["always", "never"])
def test_operations_of_a_model(scan_layers):
    model = LM(W=W, D=D, stages=(Stage((MLP(F=24),), 3),), scan_layers=scan_layers, remat="block")
    experiment = Experiment("A test.", model, DataConfig(T=T, B=B))
    layers, head = 3 * 3 * 2 * D * 24, 2 * D * W
    assert flops_per_token(experiment, structure_of(model), None) == 3 * (layers + head)
    # Of 2 labelled places a row, the head reads no other; nor does the last repeat, where it stands apart.
    layers = layers if scan_layers == "always" else layers * (2 + 2 / T) / 3
    assert flops_per_token(experiment, structure_of(model), 2) == 3 * (layers + head * 2 / T)

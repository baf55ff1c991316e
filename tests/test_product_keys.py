"""Product keys: the search is the definition, to the order of equals; a table that devices and layers may share."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from laws import collectives
from reading import QUICK, B, D, apply, pad, places, same, same_tree, stream, tokens

from layers.layer import Tokens
from layers.mlp import MLP
from layers.ops.product_keys import best, best_slots, product_keys, usage
from layers.ops.tables import weighted_sum
from layers.product_keys import ProductKeyMemory
from models.lm import LM, Stage
from models.parameters import flatten
from training import settings
from training.experiment import Mesh
from training.layout import build_layout
from training.summary import parameter_count

T = 9
SMALL = ProductKeyMemory(H=2, keys=6, top=3, K=4, V=8)


@pytest.mark.parametrize("implementation", ["naive", "product"])
def test_two_slots_by_hand(implementation):
    """Scores (1, 0) and (0.5, 0.4): sums 1.5, 1.4, 0.5, 0.4."""
    row, column = jnp.asarray([[[1.0], [0.0]]]), jnp.asarray([[[0.5], [0.4]]])
    slot, weight = product_keys(jnp.ones((1, 1, 1, 2)), row, column, 2, implementation=implementation)
    np.testing.assert_array_equal(slot[0, 0, 0], [0, 1])
    np.testing.assert_allclose(weight[0, 0, 0], [0.524979, 0.475021], rtol=2e-6)
    y = weighted_sum(jnp.eye(4), slot[:, :, 0], weight[:, :, 0])
    np.testing.assert_allclose(y[0, 0], [0.524979, 0.475021, 0, 0], rtol=2e-6)


def definition(slot_BTHk, weight_BTHk, values_WV):
    """Each of the n² slots has a weight; those not among the best weigh nothing."""
    one_BTHkW = jax.nn.one_hot(slot_BTHk, len(values_WV), dtype=weight_BTHk.dtype)
    return jnp.einsum("BTHk,BTHkW,WV->BTV", weight_BTHk, one_BTHkW, values_WV)


def searched(slot_BTHk, weight_BTHk, values_WV):
    return weighted_sum(values_WV, *(a.reshape(*a.shape[:2], -1) for a in (slot_BTHk, weight_BTHk)))


def inputs(n, H=3, K=6, V=5):
    rng = np.random.default_rng(n)
    return [rng.standard_normal(shape) for shape in ((2, 7, H, K), (H, n, K // 2), (H, n, K // 2), (n * n, V))]


@pytest.mark.parametrize(("n", "top"), [(7, 3), (12, 12), (40, 2)])
def test_the_search_is_the_definition(n, top, float64):
    of = inputs(n)
    dy_BTV = np.random.default_rng(0).standard_normal((2, 7, 5))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def read(implementation, *of):
        def call(q, row, column, values):
            found = product_keys(q, row, column, top, implementation=implementation)
            y = definition(*found, values) if implementation == "naive" else searched(*found, values)
            return y, found

        y, back, found = jax.vjp(call, *of, has_aux=True)
        return found, y, back(dy_BTV)

    naive, product = read("naive", *of), read("product", *of)
    np.testing.assert_array_equal(product[0][0], naive[0][0])
    same_tree(product, naive, "search against definition", 1e-12)


@pytest.mark.parametrize(("n", "top"), [(5, 5), (9, 4), (64, 3), (67, 6)])
def test_of_equals_the_first_is_chosen(n, top):
    """Scores are small integers, many of them equal: their sums do not round."""
    rng = np.random.default_rng(n)
    row, column = (rng.integers(0, 5, (50, n)).astype(np.float32) for _ in range(2))
    score, place = best(row, top)
    want = np.argsort(-row, -1, kind="stable")[:, :top]
    np.testing.assert_array_equal(place, want)
    np.testing.assert_array_equal(score, np.take_along_axis(row, want, -1))
    sums = (row[:, :, None] + column[:, None]).reshape(50, -1)
    np.testing.assert_array_equal(best_slots(row, column, top), np.argsort(-sums, -1, kind="stable")[:, :top])


def test_how_evenly_slots_are_used():
    slot, weight = jnp.asarray([[[0, 1], [1, 3]]]), jnp.asarray([[[0.5, 0.5], [1.0, 0.0]]])
    used, apart = usage(slot, weight, 4)
    assert float(used) == 0.5
    assert float(apart) == pytest.approx(math.log(4) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75), rel=1e-6)
    assert [float(a) for a in usage(jnp.arange(4)[None, None], jnp.ones((1, 1, 4)), 4)] == [1, pytest.approx(0)]
    none, most = usage(slot, jnp.zeros_like(weight), 4)
    assert float(none) == 0 and float(most) == pytest.approx(math.log(4))


def test_padding_uses_no_slot():
    layer = SMALL.build(D, rngs=nnx.Rngs(0))
    x_BTD, said = stream(T).astype(np.float32), tokens(np.stack([pad(places(T), (4, T))] * B))
    aux = jax.jit(lambda x_BTD, said: layer(x_BTD, said).aux, compiler_options=QUICK)
    whole, padded = aux(x_BTD[:, :4], Tokens(*(a[:, :4] for a in said))), aux(x_BTD, said)
    scalars = [{n: float(a) for n, a in said.items() if not n.startswith("rows/")} for said in (padded, whole)]
    assert scalars[0] == pytest.approx(scalars[1])
    assert 0 < float(whole["used"]) < 1 and 0 < float(whole["kl"]) < math.log(36)


def test_the_papers_two_layers():
    """Lample et al.: the sum itself, W_O only if it has another width. Memory+: the sum gated by silu(W_G x)."""
    x_BTD, said = stream(T).astype(np.float32), tokens(np.stack([places(T)] * B))
    plain = dataclasses.replace(SMALL, gate="none", V=None, norm="layer").build(D, rngs=nnx.Rngs(0))
    assert plain.gate is None and plain.out is None and plain.values.get_metadata()["residual"]
    sums = jax.jit(lambda layer: weighted_sum(layer.values[...], *layer.slots(x_BTD)), compiler_options=QUICK)
    np.testing.assert_allclose(apply(plain, x_BTD, said, None)[0], sums(plain), rtol=1e-5, atol=1e-6)
    gated = SMALL.build(D, rngs=nnx.Rngs(0))
    want = (sums(gated) * jax.nn.silu(x_BTD @ gated.gate.w[...])) @ gated.out.w[...]
    np.testing.assert_allclose(apply(gated, x_BTD, said, None)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", ["model", "fsdp"])
def test_values_that_devices_share_are_never_gathered(axis):
    """Neither pass sends anything as large as the table, nor the rows that were read: sums of them, and row numbers."""
    config = ProductKeyMemory(H=2, keys=50, top=3, K=8, V=24)
    params, alone = flatten(config.build(D, rngs=nnx.Rngs(0)))
    rows = 2 if axis == "model" else 1  # over data; those of the batch lie over fsdp, too
    layout = build_layout(Mesh(**{"data": rows, axis: 2}), B, T, jax.devices()[: 2 * rows])
    structure = alone._replace(spread=layout.spread(alone.specs))
    shardings = layout.params(structure.specs)
    assert shardings["values"].spec[0] == axis
    said, x_BTD = tokens(np.stack([places(T)] * B)), stream(T).astype(np.float32)

    def slopes(params, x_BTD, said):
        def objective(params):
            out = structure.module(params)(x_BTD, said)
            return jnp.sum(jnp.square(out.y_BTD)), out.aux

        return jax.grad(objective, has_aux=True)(params)

    arguments = jax.device_put(params, shardings), *jax.device_put((x_BTD, said), layout.batch)
    program = jax.jit(slopes, out_shardings=(shardings, None)).lower(*arguments).compile()
    slots, columns = config.slots, [{0, 2}, {1, 3}] if rows == 2 else [{0}, {1}]  # devices that hold the same rows
    sent = 0  # at once, of anything that tokens have; T is no other size
    for kind, shape, groups in collectives(program.as_text()):
        sent = max(sent, math.prod(shape) if T in shape else 0)
        assert slots not in shape or shape == [slots], f"{kind} of the table"  # how often each slot is used
        if slots // 2 in shape:  # the sum of the gradient's shards over the batch is all that may be of that size
            assert kind == "all-reduce" and all(any(g <= c for c in columns) for g in groups), (kind, shape, groups)
    assert 0 < sent <= B * T * 24, f"{sent} numbers are sent at once"
    same_tree(program(*arguments), jax.jit(slopes)(params, x_BTD, said), "a mesh against a device", 1e-5)


SHARED = dataclasses.replace(SMALL, shared=True)
MODEL = LM(W=257, D=16, stages=(Stage((MLP(F=8), SHARED), repeats=3),), scan_layers="never")
VALUES = "stages.0.layers.1.values"


def structure_of(config):
    return flatten(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1]


def scored(structure, params, model=lambda model: model):
    """Gradients and logits of a few tokens."""
    said = tokens(np.stack([places(T)] * B))

    def objective(params):
        y = model(structure.module(params))(Tokens(*said)).y_BTD
        return jnp.sum(jnp.square(y)), y

    return jax.jit(jax.grad(objective, has_aux=True), compiler_options=QUICK)(params)


def test_the_repeats_of_a_stage_share_a_table(float64):
    """One table, keys for each; its gradient is the sum of those of tables apart, in whatever way repeats are run."""
    structure, rng = structure_of(MODEL), np.random.default_rng(0)
    params = {name: 0.3 * rng.standard_normal(spec.shape) for name, spec in structure.specs.items()}
    spec = structure.specs[VALUES]
    assert (spec.shape, spec.axes, spec.table, spec.decay) == ((36, 8), "WV", True, False)
    assert structure.specs["stages.0.layers.1.row"].axes == "LHSK"
    slopes, y = scored(structure, params)

    own = dataclasses.replace(MODEL, stages=(Stage((MLP(F=8), SMALL), repeats=3),))
    apart = structure_of(own)
    assert apart.specs[VALUES].axes == "LWV" and apart.specs[VALUES].shape == (3, 36, 8)
    assert parameter_count(apart.specs) - parameter_count(structure.specs) == 2 * 36 * 8
    copies = params | {VALUES: jnp.stack([params[VALUES]] * 3)}
    apart_slopes, apart_y = scored(apart, copies)
    same(y, apart_y, "logits")
    assert all(np.abs(one).max() > 1e-6 for one in apart_slopes[VALUES])  # each of the layers writes to it
    same_tree(slopes, apart_slopes | {VALUES: jnp.sum(apart_slopes[VALUES], 0)}, "gradients")

    scanned = dataclasses.replace(MODEL, scan_layers="always", remat="block")
    same_tree(scored(structure_of(scanned), params), (slopes, y), "scanned, computed again")
    same_tree(scored(structure, params, lambda model: model.unstacked()), (slopes, y), "laid out apart")


@pytest.mark.slow
def test_a_run_with_a_shared_table_goes_on_bit_for_bit(tmp_path):
    changes = {"model": MODEL, "train__eval_every": 0}
    whole = tiny.arrays(tiny.trained(tmp_path, "whole", train__steps=8, **changes))
    tiny.trained(tmp_path, "cut", train__steps=6, **changes)
    assert tiny.arrays(tiny.trained(tmp_path, "cut", train__steps=8, **changes)) == whole


def test_the_laptop_twins_have_equally_many_parameters():
    product_keys, engram = (settings.load(settings.config_files()[name]) for name in ("product_keys", "engram"))
    assert product_keys.parameters == pytest.approx(engram.parameters, rel=0.01)
    assert (product_keys.data, product_keys.optimizer, product_keys.train) == (
        engram.data, engram.optimizer, engram.train
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductKeyMemory(top=1), r"ProductKeyMemory.top is 1: it must be from 2 \(the weight of one"),
        (lambda: ProductKeyMemory(keys=16), "ProductKeyMemory.top is 32: .* to keys = 16"),
        (lambda: ProductKeyMemory(K=7), "ProductKeyMemory.K is 7: it must be even"),
        (lambda: ProductKeyMemory(H=0), "ProductKeyMemory.H is 0: it must be at least 1"),
        (lambda: ProductKeyMemory(V=0), "ProductKeyMemory.V is 0: it must be at least 1"),
        (lambda: ProductKeyMemory(keys=50_000), "ProductKeyMemory.keys is 50000: .* at most 46340 keys"),
        (lambda: ProductKeyMemory(gate="gelu"), "ProductKeyMemory.gate is 'gelu': it must be one of silu, none"),  # type: ignore[arg-type]
        (lambda: ProductKeyMemory(norm="batch"), "ProductKeyMemory.norm is 'batch': .* none, rms, layer"),  # type: ignore[arg-type]
        (lambda: product_keys(jnp.ones((1, 1, 1, 4)), *[jnp.ones((1, 3, 1))] * 2, 2), "product_keys: queries "),
        (lambda: product_keys(jnp.ones((1, 1, 1, 2)), *[jnp.ones((1, 3, 1))] * 2, 4), "product_keys: .* 4 slots"),
        (
            lambda: product_keys(jnp.ones((1, 1, 1, 2)), *[jnp.ones((1, 3, 1))] * 2, 2, implementation="fast"),
            "product_keys: implementation is 'fast'",
        ),
    ],
)
def test_bad_product_keys_are_named(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)

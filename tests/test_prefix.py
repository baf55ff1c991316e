"""Regions read ahead: the paper's sums, whatever the form; one state to begin with, and the usual law from there on."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reading import QUICK, B, Said, cast, pad, places, same, same_tree, tokens
from rich.console import Console

from layers.gated_conv import GatedConv
from layers.linear import EPSILON, LinearAttention
from layers.mlp import MLP
from layers.ops import prefix
from layers.ops.linear import linear_recurrence
from layers.ops.prefix import first_document
from layers.prefix import PrefixLinearAttention
from models.decode import Decoder, Sampling
from models.lm import LM, Stage
from models.loss import ASK_NOTHING, shares
from models.parameters import flatten
from training.data import DataConfig, DataError
from training.experiment import AdamW, Experiment, Train
from training.optimizer import build_optimizer
from training.prefix import PrefixText
from training.report import report
from training.run import train
from training.step import DeviceBatch, init_state, train_step

D, T = 16, 21
CONFIG = PrefixLinearAttention(H=2, K=3, V=4, chunk=8)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, D))
SAID = tokens(np.stack([places(T)] * B))


@functools.cache
def built(config=CONFIG):
    layer = cast(config.build(D, rngs=nnx.Rngs(0)), np.float64)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), layer)


def by(implementation, config=CONFIG):
    """The same parameters, read by another implementation."""
    config = dataclasses.replace(config, implementation=implementation)
    structure = jax.tree.structure(jax.eval_shape(lambda: config.build(D, rngs=nnx.Rngs(0))))
    return jax.tree.unflatten(structure, jax.tree.leaves(built()))


@functools.partial(jax.jit, compiler_options=QUICK)
def ahead(layer, x_BTD, said, prefix_BT, state):
    return layer.prefixed(x_BTD, said, prefix_BT, state)[:2]


@functools.partial(jax.jit, compiler_options=QUICK)
def usual(layer, x_BTD, said, state):
    return layer(x_BTD, said, state)[:2]


@functools.partial(jax.jit, compiler_options=QUICK)
def pull(layer, x_BTD, said, prefix_BT, state, dy_BTD, d_state):
    out, back = jax.vjp(lambda *a: layer.prefixed(a[0], said, prefix_BT, a[1])[:2], x_BTD, state)
    _, back_layer = jax.vjp(lambda layer: layer.prefixed(x_BTD, said, prefix_BT, state)[:2], layer)
    return out, back((dy_BTD, d_state)), back_layer((dy_BTD, d_state))


def empty():
    return cast(built().init_state(B, T), np.float64)


def region(*lengths):
    return np.arange(T) < np.array(lengths)[:, None]


def printed(layer, x_TD, M):
    """Equation of JRT-RNN's layer, token by token and pair by pair, of one document with its first M tokens ahead."""
    q, k, v, ke, ve = (
        np.einsum("TD,DHK->THK", x_TD, np.asarray(m.w[...]))
        for m in (
            layer.query,
            *(getattr(layer.written, n) for n in layer.written.names),
            *map(layer.ahead.__getattribute__, layer.ahead.names),
        )
    )

    def weight(a, b):
        s = a @ b / np.sqrt(len(a))
        return 1 + s + s * s / 2

    y = np.zeros((len(x_TD), layer.config.H, v.shape[-1]))
    for i in range(len(x_TD)):
        for h in range(layer.config.H):
            sums = [(weight(q[i, h], k[j, h]), v[j, h]) for j in range(i + 1)]
            sums += [(weight(q[i, h], ke[j, h]), ve[j, h]) for j in range(M)]
            y[i, h] = sum(a * b for a, b in sums) / (sum(a for a, _ in sums) + EPSILON)
    return np.einsum("THV,HVD->TD", y, np.asarray(layer.out.w[...]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_the_layer_is_the_equation_that_is_printed(implementation):
    y_BTD, _ = ahead(by(implementation), X, SAID, region(13, T), empty())
    for row, M in enumerate((13, T)):
        same(y_BTD[row], printed(built(), X[row], M), f"{M} tokens ahead")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("chunk", "broken"),
    [
        (6, lambda pos: jnp.where(pos == 1, 0, pos)),  # the first token forgets what was read ahead
        (7, lambda pos: jnp.where(pos == 9, 0, pos)),  # what was read ahead is lost on the way
    ],
    ids=["forgotten at the start", "lost on the way"],
)
def test_a_region_that_is_forgotten_is_no_region(monkeypatch, chunk, broken):
    """A chunk of its own each: what is compiled for a config is shared by whoever has it."""
    monkeypatch.setattr(
        prefix, "linear_recurrence", lambda *a, pos, **options: linear_recurrence(*a, pos=broken(pos), **options)
    )
    y_BTD, _ = ahead(by("chunked", dataclasses.replace(CONFIG, chunk=chunk)), X, SAID, region(13, T), empty())
    with pytest.raises(AssertionError, match="13 tokens ahead: relative error"):
        same(y_BTD[0], printed(built(), X[0], 13), "13 tokens ahead")


@pytest.mark.usefixtures("float64")
def test_the_forms_agree_in_value_state_and_gradients():
    """Documents, padding, a document that goes on, and marks where they say nothing."""
    first = pad(places(T, 12), (0, 3), (8, 10))
    pos_BT = np.stack([first, places(T, 15) + np.where(np.arange(T) < 15, 4, 0)])
    said, prefix_BT = tokens(pos_BT), RNG.random((B, T)) < 0.6
    state = jax.tree.map(lambda a: RNG.standard_normal(a.shape) ** 2, empty())
    d_state = jax.tree.map(lambda a: RNG.standard_normal(a.shape), state)
    dy = np.where((pos_BT >= 0)[..., None], RNG.standard_normal((B, T, D)), 0)
    (y, after), slopes, d_layer = pull(by("naive"), X, said, prefix_BT, state, dy, d_state)
    (got_y, got_after), got_slopes, got_d_layer = pull(by("chunked"), X, said, prefix_BT, state, dy, d_state)
    live = (pos_BT >= 0)[..., None]
    same(np.where(live, got_y, 0), np.where(live, y, 0), "y")
    same_tree(got_after, after, "state")
    same_tree(got_slopes, slopes, "gradients in x and state")
    same_tree(jax.tree.leaves(got_d_layer), jax.tree.leaves(d_layer), "gradients in the layer")
    assert np.abs(got_slopes[1].memory_BHKV[1]).max() > 0 and not np.abs(got_slopes[1].memory_BHKV[0]).any()
    # Marks on padding and on later documents say nothing; such a document is read as if there were no region.
    first_BT = np.asarray(first_document(jnp.asarray(pos_BT))[0])
    assert [row.sum() for row in first_BT] == [12, 15]
    marked, _ = ahead(by("chunked"), X, said, prefix_BT, state)
    only, _ = ahead(by("chunked"), X, said, prefix_BT & first_BT, state)
    same(np.where(live, only, 0), np.where(live, marked, 0), "marks elsewhere", 0)
    plain, _ = usual(by("chunked"), X, said, state)
    later = live & ~first_BT[..., None]
    same(np.where(later, plain, 0), np.where(later, marked, 0), "later documents")
    changed = np.abs(plain - marked).max(-1) > 1e-6
    assert changed[first_BT].all()


@pytest.mark.usefixtures("float64")
def test_after_the_region_any_cut_gives_the_same():
    """The region in one call, then pieces by the usual call; rows of different regions are each as they are alone."""
    layer, prefix_BT = by("chunked"), region(13, 5)
    y_BTD, end = ahead(layer, X, SAID, prefix_BT, empty())

    def cut(a, b):
        return Said(*(x[:, a:b] for x in SAID))

    part, state = ahead(layer, X[:, :13], cut(0, 13), prefix_BT[:, :13], empty())
    parts = [part]
    for start, stop in ((13, 19), (19, 20), (20, 21)):
        part, state = usual(layer, X[:, start:stop], cut(start, stop), state)
        parts.append(part)
    same(np.concatenate(parts, 1), y_BTD, "region, then pieces")
    same_tree(state, end, "final state")
    for row, M in enumerate((13, 5)):
        alone, _ = ahead(layer, np.repeat(X[row : row + 1], B, 0), SAID, region(M, M), empty())
        same(alone[1], y_BTD[row], "a row among others")
    trained, none = ahead(layer, X, SAID, prefix_BT, None)
    assert none is None
    same(trained, y_BTD, "training call")


@pytest.mark.usefixtures("float64")
def test_padding_and_an_empty_region_change_nothing():
    layer = by("chunked")
    y_BTD, end = ahead(layer, X, SAID, region(6, 6), empty())
    # Six tokens of padding before, which are marked too and hold anything.
    moved = np.concatenate([9 - X[:, :6], X[:, :15]], 1)
    said = tokens(np.stack([np.concatenate([np.full(6, -1), np.arange(15)])] * B))
    got, _ = ahead(layer, moved, said, region(12, 12), empty())
    same(got[:, 6:], y_BTD[:, :15], "padding before")
    plain, plain_end = usual(layer, X, SAID, empty())
    none, none_end = ahead(layer, X, SAID, region(0, 0), empty())
    same(none, plain, "no region")
    same_tree(none_end, plain_end, "no region: state")
    assert np.abs(y_BTD - plain).max() > 1e-3


def test_what_an_encoder_cannot_have():
    with pytest.raises(ValueError, match="PrefixLinearAttention.conv is 4"):
        PrefixLinearAttention(conv=4)
    count = sum(a.size for a in jax.tree.leaves(built())) - sum(
        a.size for a in jax.tree.leaves(LinearAttention(H=2, K=3, V=4, feature_map="taylor").build(D, rngs=nnx.Rngs(0)))
    )
    assert count == D * 2 * (3 + 4)  # two maps, nothing else


# The model, its generation and its loss

W = 19
MODEL = LM(W=W, D=D, stages=(Stage((GatedConv(), CONFIG, MLP(F=16)), 2),), tied=True)
IDS = RNG.integers(0, W, (B, T)).astype(np.int32)


@functools.cache
def model(dtype=np.float64):
    structure = flatten(jax.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0))))[1]
    rng = np.random.default_rng(3)
    return structure, {name: (rng.standard_normal(s.shape) * 0.3).astype(dtype) for name, s in structure.specs.items()}


@functools.partial(jax.jit, compiler_options=QUICK)
def logits(params, ids, pos, prefix_BT, at_BN=None):
    module = model()[0].module(params)
    return module.logits(module.hidden(Said(ids, pos), prefix_BT=prefix_BT, at_BN=at_BN).y_BTD)


@pytest.mark.usefixtures("float64")
def test_a_model_knows_the_region_and_not_what_follows():
    params, pos = model()[1], SAID.pos_BT
    whole = np.asarray(logits(params, IDS, pos, region(8, 3)))
    other = IDS.copy()
    other[:, 8:] = (other[:, 8:] + 1) % W
    same(logits(params, other, pos, region(8, 3))[:, :8], whole[:, :8], "what follows the region", 1e-13)
    other = IDS.copy()
    other[:, 6] = (other[:, 6] + 1) % W
    moved = np.abs(np.asarray(logits(params, other, pos, region(8, 3))) - whole).max(-1)
    assert (moved[0] > 1e-9).all() and not moved[1, :6].any()  # seen from its start; of the row with 3 tokens, never
    at = np.array([[9, 20], [2, 5]], np.int32)
    asked = logits(params, IDS, pos, region(8, 3), at)
    same(asked, np.take_along_axis(whole, at[..., None], 1), "asked at few places")


def test_prompts_are_read_ahead_and_then_decoded():
    """Greedy words of prompts of several lengths: those of the whole model with the same region."""
    structure, params = model(np.float32)
    decoder = Decoder(structure.module(jax.device_put(params, jax.devices()[0])), piece=4, burst=4)
    prompts, prefix = [[7, 3, 11, 2, 5, 8, 1, 0, 2], [6, 4], [12, 0, 17, 17, 1, 9]], 5
    words = np.concatenate(list(decoder.generate(prompts, 6, Sampling(temperature=0), prefix=prefix)), 1)
    plain = np.concatenate(list(decoder.generate(prompts, 6, Sampling(temperature=0))), 1)
    assert (words != plain).any()
    with jax.enable_x64(True):
        for prompt, said in zip(prompts, words, strict=True):
            ids = np.zeros((B, T), np.int32)
            ids[:, : len(prompt) + 6] = [*prompt, *said]
            M = min(prefix, len(prompt) - 1)
            found = logits(model()[1], ids, SAID.pos_BT, region(M, M))[0]
            np.testing.assert_array_equal(said, np.argmax(found, -1)[len(prompt) - 1 : len(prompt) + 5])
    with pytest.raises(ValueError, match="prefix is -1"):
        next(decoder.generate(prompts, 6, prefix=-1))


def test_the_loss_is_the_mean_of_two_means():
    labels = np.where(RNG.random((4, T)) < 0.5, RNG.integers(0, W, (4, T)), ASK_NOTHING).astype(np.int32)
    where = np.broadcast_to(np.arange(T) < 9, (4, T))
    nll = RNG.random((4, T))
    asked = labels != ASK_NOTHING
    after, within = (float(x) for x in shares(jnp.asarray(labels), jnp.asarray(where), 0.25))
    expected = (nll[asked & ~where].mean() + 0.25 * nll[asked & where].mean()) / 1.25
    np.testing.assert_allclose((nll * asked * np.where(where, within, after)).sum(), expected, rtol=1e-5)
    only = jnp.where(where, ASK_NOTHING, labels)
    after, _ = (float(x) for x in shares(only, jnp.asarray(where), 0.25))
    np.testing.assert_allclose(after, 1 / (asked & ~where).sum(), rtol=1e-6)


@functools.cache
def stepped(accumulate):
    experiment = Experiment("", MODEL, DataConfig(T=T, B=4), AdamW(), Train(accumulate=accumulate))
    structure, params = model(np.float32)
    optimizer = build_optimizer(experiment.optimizer, 10, None, structure.specs)
    step = train_step(experiment, structure, optimizer, np.ones([W], np.int32), None)
    ids = np.random.default_rng(5).integers(0, W, (4, T)).astype(np.int32)
    where = np.arange(T) < np.array([9, 4, 0, 12])[:, None]
    hidden = where & (np.arange(T) % 3 == 1)
    labels = np.where(hidden, ids, np.where(where, ASK_NOTHING, np.roll(ids, -1, 1))).astype(np.int32)
    batch = DeviceBatch(np.where(hidden, W - 1, ids), np.tile(np.arange(T, dtype=np.int32), (4, 1)), labels, where)
    state = init_state(experiment, jax.tree.map(jnp.asarray, params), optimizer)
    return batch, *jax.jit(step)(state, batch)


def test_a_step_learns_hidden_and_next_tokens():
    batch, state, said = stepped(1)
    found = np.asarray(jax.nn.log_softmax(logits(model(np.float32)[1], *batch[:2], batch.prefix_BT)))
    asked = batch.labels_BT != ASK_NOTHING
    nll = -np.take_along_axis(found, np.where(asked, batch.labels_BT, 0)[..., None], -1)[..., 0]
    within, after = asked & batch.prefix_BT, asked & ~batch.prefix_BT
    np.testing.assert_allclose(said["loss"], (nll[after].mean() + 0.25 * nll[within].mean()) / 1.25, rtol=1e-4)
    np.testing.assert_allclose(said["bits_per_byte"], nll[after].mean() / np.log(2), rtol=1e-4)
    right = found.argmax(-1) == batch.labels_BT
    np.testing.assert_allclose(said["accuracy"], right[after].mean(), rtol=1e-6)
    before = model(np.float32)[1]
    encoder = [name for name in before if ".ahead." in name]
    assert len(encoder) == 2 and all((np.asarray(state["params"][n]) != before[n]).any() for n in encoder)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_it():
    _, whole, said = stepped(1)
    _, parts, again = stepped(2)
    np.testing.assert_allclose(again["loss"], said["loss"], rtol=1e-5)
    np.testing.assert_allclose(again["grad_norm"], said["grad_norm"], rtol=1e-4)


# The data


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, store = tmp_path_factory.mktemp("prefix"), tmp_path_factory.mktemp("store")
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"{n} " + "abcdefgh " * (7 + n))
    return PrefixText(T=40, B=8, source=str(folder), store=str(store), held_out=0.3, prefix=16, masked=0.3)


def test_text_has_a_region_with_hidden_tokens(text):
    data = text.build()
    plain = super(type(data), data)
    hidden = total = 0
    for step in range(6):
        batch, source = data.batch(3, step), plain.batch(3, step)
        for b in range(8):
            starts = np.flatnonzero(source.pos_BT[b] == 0)
            end = min([16, *starts[starts > 0]])
            np.testing.assert_array_equal(batch.prefix_BT[b], np.arange(40) < end)
        covered = batch.ids_BT == data.hidden
        assert not (covered & ~batch.prefix_BT).any() and not (covered & (source.ids_BT == data.doc_start)).any()
        np.testing.assert_array_equal(batch.ids_BT[~covered], source.ids_BT[~covered])
        np.testing.assert_array_equal(batch.labels_BT[covered], source.ids_BT[covered])
        assert (batch.labels_BT[batch.prefix_BT & ~covered] == ASK_NOTHING).all()
        np.testing.assert_array_equal(batch.labels_BT[~batch.prefix_BT], source.labels_BT[~batch.prefix_BT])
        some = data.batch(3, step, slice(2, 5))
        for mine, theirs in zip(some, batch, strict=True):
            np.testing.assert_array_equal(mine, theirs[2:5])
        hidden, total = hidden + covered.sum(), total + batch.prefix_BT.sum()
    assert abs(hidden / total - 0.3) < 4 * np.sqrt(0.21 / total)
    assert data.hidden == 257 and data.words == 258 == len(data.token_bytes)
    assert data.decode(np.array([97, data.hidden, 98])) == "ab"
    for batch in data.held_out():
        assert (batch.ids_BT != data.hidden).all() and (batch.labels_BT[batch.prefix_BT] == ASK_NOTHING).all()
        assert (batch.labels_BT != ASK_NOTHING).any()


@pytest.mark.slow
def test_a_run_reads_ahead(text, tmp_path):
    """From the config to a sample: the loss that is logged is of both kinds of labels, held-out text of next tokens."""
    lm = LM(W=258, D=D, stages=(Stage((GatedConv(), CONFIG)),))
    steps = Train(steps=3, log_every=1, eval_every=3, checkpoint_every=3, tensorboard=False)
    experiment = Experiment("A run.", lm, text, AdamW(), steps, sample="abc")
    console = Console(file=io.StringIO(), width=200)
    outcome = train(experiment, tmp_path / "run", console=console)
    assert outcome["status"] == "done" and np.isfinite(outcome["evaluation"]["loss"])
    by_place = outcome["evaluation"]["nll_by_position"]
    assert by_place[0] == 0 < min(by_place[16:]) and outcome["evaluation"]["bits_per_byte"] > 0
    report(experiment, outcome, tmp_path / "run", console)
    assert (tmp_path / "run" / "samples.txt").read_text().count("abc")
    longer = dataclasses.replace(experiment, train=dataclasses.replace(steps, steps=5))
    assert train(longer, tmp_path / "run", console=console)["step"] == 5


def test_text_that_cannot_be(text):
    with pytest.raises(DataError, match="PrefixText.prefix is 40: it must be at least 1 and below T = 40"):
        dataclasses.replace(text, prefix=40)
    with pytest.raises(DataError, match="PrefixText.masked is 1"):
        dataclasses.replace(text, masked=1.0)

"""ablate.py RUN: what is left out is left out, and nothing else; the error is that of paired rows; what is kept."""

import dataclasses
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import ablate
import layers
from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.engram import Engram
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import Tokens
from layers.memory_as_layer import MemoryAsLayer
from layers.mlp import MLP
from models.lm import LM, Stage
from models.over_encoding import OverEncoding
from models.parameters import flatten
from probes import parts
from probes.parts import Asked, Rows, narrowed, widest
from probes.small_runs import Ledger
from probes.tasks.task import discover
from probes.without import compared
from training.run import load_model, train

T, WINDOW = 16, 6
MEMORY = GatedDeltaNet(H=2, K=4, V=4, conv=2, chunk=4)
PATTERN = (MEMORY, Attention(H=2, window=WINDOW), Engram(H=1, K=4, rows=50, conv=2), MLP(F=16))
MODEL = LM(W=257, D=16, stages=(Stage(PATTERN, 2),), ngrams=OverEncoding(H=1, K=4, rows=50))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps on documents so short that some start in the second half of a row."""
    folder, draw = tmp_path_factory.mktemp("without"), random.Random(0)
    (folder / "text").mkdir()
    for index in range(40):
        length = draw.randrange(8, 60)
        (folder / "text" / f"{index}.txt").write_text("".join(draw.choice("abcdef \n") for _ in range(length)))
    changes = {"optimizer__lr": 0.05, "data__B": 3}
    tiny.trained(folder, "run", model=MODEL, train__steps=3, train__eval_every=3, train__checkpoint_every=3, **changes)
    return folder / "run"


@pytest.fixture(scope="module")
def probe_run(tmp_path_factory):
    """Two steps of recall, by a model that has no tables and no window."""
    folder = tmp_path_factory.mktemp("without_probe")
    data = discover()["mqar@smoke"].data
    model = LM(W=data.build().words, D=16, stages=(Stage((GatedDeltaNet(H=2, K=4, V=4, conv=0, chunk=8),)),))
    made = tiny.experiment(folder, model=model, data=data, train__steps=2, train__eval_every=2, train__eval_batches=1)
    train(made, folder / "run", console=tiny.quiet())
    return folder / "run"


@pytest.fixture(scope="module")
def asked(run):
    model, _, dataset = load_model(run)
    return Asked(model, dataset, 3)


def door(capsys, *arguments):
    code = ablate.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def by_hand(asked, model, skip=()):
    """Bits, bytes and labels of each row, from logits."""
    call = jax.jit(lambda model, tokens: model(tokens, skip=skip).y_BTD)
    found = []
    for batch in asked.data:
        logits = np.asarray(call(model, Tokens(*map(jnp.asarray, batch[:2]))), np.float64)
        nll = (
            np.log(np.exp(logits).sum(-1))
            - np.take_along_axis(logits, np.maximum(batch.labels_BT, 0)[..., None], 2)[..., 0]
        )
        own = batch.labels_BT >= 0
        text = asked.dataset.token_bytes[np.maximum(batch.labels_BT, 0)] * own
        found.append(np.stack([(nll * own).sum(1) / np.log(2), text.sum(1), own.sum(1)]))
    table = np.concatenate(found, 1)
    return Rows(*table[:, table[2] > 0])


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def differ(a, b):
    assert np.max(np.abs(a.sum_R - b.sum_R)) > 1e-3


def piece(found, place, layer, width=None):
    return next(p for p in found if p[:3] == (place, layer, width))


def test_a_layer_that_is_skipped_adds_nothing(asked):
    found = list(asked.layers())
    assert [p.place for p in found] == [f"0.{r}.{i}" for i in range(4) for r in ("*", 0, 1)]
    whole = asked.whole("layers")
    same(whole, by_hand(asked, asked.model))
    for place, layer in (("0.*.1", "Attention"), ("0.1.3", "MLP")):
        without = piece(found, place, layer).ask()
        same(without, by_hand(asked, asked.model, (place,)))
        differ(without, whole)


def test_a_table_without_rows_is_a_table_of_zeros(asked):
    found = list(asked.tables())
    assert [p[:2] for p in found] == [
        ("ngrams", "OverEncoding table"),
        *((place, "Engram table") for place in ("0.*.2", "0.0.2", "0.1.2")),
    ]
    for p in found:
        name = "ngrams.table" if p.place == "ngrams" else "stages.0.layers.2.table"
        table = np.array(asked.params[name])
        table[{"0.0.2": 0, "0.1.2": 1}.get(p.place, slice(None))] = 0
        without = p.ask()
        same(without, by_hand(asked, asked.structure.module({**asked.params, name: jnp.asarray(table)})))
        differ(without, asked.whole("tables"))


def slowly(asked, batch, frozen):
    """Natural-log losses of second halves, [B, T / 2]: each row alone, its states replaced by hand between tokens."""
    model = asked.model
    step = jax.jit(lambda model, ids, pos, state: model(Tokens(ids, pos), state)[:2])
    losses = np.zeros([len(batch.ids_BT), T // 2])
    for b, (ids, pos, labels) in enumerate(zip(*batch[:3], strict=True)):
        empty = model.init_state(1, T)
        _, state = step(model, jnp.asarray(ids[None, : T // 2]), jnp.asarray(pos[None, : T // 2]), empty)
        held = state
        for t in range(T // 2, T):
            seen = list(held[0][r][i] if f"0.{r}.{i}" in frozen else state[0][r][i] for r in range(2) for i in range(4))
            state = ((tuple(seen[:4]), tuple(seen[4:])), held[1] if "ngrams" in frozen else state[1])
            logits, state = step(model, jnp.asarray(ids[None, t : t + 1]), jnp.asarray(pos[None, t : t + 1]), state)
            held = empty if pos[t] == 0 else held
            logits = np.asarray(logits[0, 0], np.float64)
            losses[b, t - T // 2] = np.log(np.exp(logits).sum()) - logits[max(labels[t], 0)] if labels[t] >= 0 else 0
    return losses


def test_a_memory_that_is_frozen_stays_as_it_was_at_the_middle(asked):
    places = [f"0.{r}.{i}" for r in range(2) for i in range(3)]
    assert sorted(asked.reader.places) == [*places, "ngrams"]
    batch = max(asked.data[:2], key=lambda batch: (batch.pos_BT[:, T // 2 :] == 0).sum())
    assert (batch.pos_BT[:, T // 2 + 1 : -1] == 0).any() and (batch.pos_BT >= 0).all()
    before = asked.reader.before(batch)
    whole = asked.reader(batch, before, ()).nll
    for frozen in ((), ("0.1.0",), ("0.0.1", "0.1.1"), ("ngrams", "0.0.2"), tuple(asked.reader.places)):
        found = asked.reader(batch, before, frozen).nll
        np.testing.assert_allclose(found, slowly(asked, batch, frozen), rtol=1e-4, atol=1e-4)
        assert not frozen or np.max(np.abs(found - whole)) > 1e-3
    found = list(asked.writes())
    assert [p.place for p in found] == ["ngrams", *(f"0.{r}.{i}" for i in range(3) for r in ("*", 0, 1)), "all"]
    second = asked.whole("writes")
    same(piece(found, "0.*.1", "Attention").ask(), asked.frozen(["0.0.1", "0.1.1"]))
    for rows in (second, piece(found, "all", "memories").ask()):
        assert rows.asked_R.sum() == sum((b.labels_BT[:, T // 2 :] >= 0).sum() for b in asked.data)
        assert (rows.weight_R == rows.asked_R).all()  # tokens are bytes
    differ(second, piece(found, "0.1.0", "GatedDeltaNet").ask())


def test_nothing_after_the_middle_is_known_where_all_is_frozen(asked):
    batch, every = asked.data[0], asked.reader.places
    other = batch.ids_BT.copy()
    other[:, T // 2 + 2] = (other[:, T // 2 + 2] + 1) % 97
    changed = batch._replace(ids_BT=other)
    before = asked.reader.before(batch)
    for frozen, alike in ((every, True), (every[:-1], False)):
        one, two = (np.asarray(asked.reader(b, before, frozen).nll) for b in (batch, changed))
        assert np.array_equal(np.delete(one, 2, 1), np.delete(two, 2, 1)) == alike
    assert (one[:, 2] != two[:, 2]).any()


def test_shorter_rows_have_their_own_middles(asked):
    """A row that ends in padding is frozen at the middle of its own tokens, beside one that is whole."""
    batch = asked.data[0]
    short = 10
    pos, labels = batch.pos_BT.copy(), batch.labels_BT.copy()
    pos[1, short:], labels[1, short - 1 :] = -1, -100
    mixed = batch._replace(pos_BT=pos, labels_BT=labels)
    start, middles = asked.reader.halves(mixed)
    assert start == 4 and middles.tolist() == [8, 5, 8]
    frozen = asked.reader.places
    found = np.asarray(asked.reader(mixed, asked.reader.before(mixed), frozen).nll)
    alone = asked.reader(batch, asked.reader.before(batch), frozen).nll
    np.testing.assert_allclose(found[[0, 2], 4:], np.asarray(alone)[[0, 2]], rtol=1e-5, atol=1e-5)
    assert (found[:, 0] == 0).all() and (found[1, 1:5] > 0).all() and (found[1, 5:] == 0).all()


def test_windows_are_narrowed_and_nothing_else(asked):
    found = list(asked.window())
    assert [p[:3] for p in found] == [("0.*.1", "Attention", width) for width in (3, 1)]
    same(asked.narrow([(0, 1)], WINDOW), asked.whole("window"))
    pattern = (MEMORY, Attention(H=2, window=1), *PATTERN[2:])
    blind = dataclasses.replace(MODEL, stages=(Stage(pattern, 2),))
    structure = flatten(jax.eval_shape(lambda: blind.build(rngs=nnx.Rngs(0))))[1]
    without = piece(found, "0.*.1", "Attention", 1).ask()
    same(without, by_hand(asked, structure.module(asked.params)))
    differ(without, asked.whole("window"))


def test_windows_within_layers_are_found():
    nested = MemoryAsLayer(attention=Attention(H=2, window=6))
    assert widest(nested, 16) == 6 and narrowed(nested, 3).attention.window == 3 and narrowed(nested, 8) == nested
    assert widest(Attention(), 16) == 16 and narrowed(Attention(), 4).window == 4
    blind = ChunkAttention()
    assert widest(blind, 16) == 0 and narrowed(blind, 4) == blind
    global_and_not = LM(W=9, D=8, stages=(Stage((Attention(H=2), MLP())), Stage((Attention(H=2, window=4),), 2)))
    narrow = parts.narrowed_model(global_and_not, [(1, 0)], 2)
    assert [narrow.stages[s].pattern[0].window for s in (0, 1)] == [None, 2]
    for cls in layers.discover():
        for example in cls.examples():
            if widest(example, 64) > 1:
                shapes = [
                    flatten(jax.eval_shape(lambda e=e: e.build(64, rngs=nnx.Rngs(0))))[1].specs
                    for e in (example, narrowed(example, 1))
                ]
                assert shapes[0] == shapes[1]


def test_the_error_is_of_rows_in_pairs():
    draw = np.random.default_rng(0)
    one, two = draw.normal(size=(2, 12)) + 5
    equal = np.full(12, 4.0)
    found = compared(Rows(one, equal, equal), Rows(two, equal, equal))
    assert np.isclose(found["whole"], one.mean() / 4) and np.isclose(found["difference"], (two - one).mean() / 4)
    assert np.isclose(found["standard_error"], ((two - one) / 4).std(ddof=1) / np.sqrt(12))
    assert (found["rows"], found["tokens"]) == (12, 48)
    # Of rows of different weights: about what leaving out a row at a time says (the jackknife).
    weight = draw.integers(50, 60, 12).astype(float)
    said = compared(Rows(one, weight, weight), Rows(two, weight, weight))
    left = np.array([np.delete(two - one, r).sum() / np.delete(weight, r).sum() for r in range(12)])
    jackknife = np.sqrt(11 / 12 * np.square(left - left.mean()).sum())
    assert np.isclose(said["standard_error"], jackknife, rtol=0.02)
    assert compared(Rows(*np.ones([3, 1])), Rows(*np.ones([3, 1])))["standard_error"] is None


def test_a_run_is_asked_once_and_reported(run, capsys, tmp_path, monkeypatch):
    code, out, err = door(capsys, run, "--batches", 2, "--folder", tmp_path, "--parts", "tables", "window", "writes")
    assert code == 0 and "window: 0.*.1 Attention, window 3: " in out and out.endswith(f"{tmp_path / 'report.md'}\n")
    rows = Ledger(tmp_path / "ablation.jsonl").rows
    assert [row["part"] for row in rows] == ["tables"] * 4 + ["window"] * 2 + ["writes"] * 11
    for row in rows:
        assert (row["run"], row["step"], row["batches"], row["measure"]) == ("run", 3, 2, "bits_per_byte")
        assert np.isclose(row["without"] - row["whole"], row["difference"]) and row["standard_error"] > 0
        assert row["rows"] == 6 and 0 < row["tokens"] <= 6 * T and row["command"].startswith("python ablate.py ")
    report = (tmp_path / "report.md").read_text()
    assert "## writes" in report and "| 0.*.1 | Attention | 3 |" in report and rows[0]["command"] in report
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.jsonl", "report.md"} | {
        f"parts{dark}.{kind}" for dark in ("", "-dark") for kind in ("png", "svg")
    }
    monkeypatch.setattr(parts, "gathered", None)
    flags = ["--batches", 2, "--folder", tmp_path, "--parts", "tables", "window", "writes"]
    code, again, _ = door(capsys, run, *flags)
    assert code == 0 and "window 3" not in again and (tmp_path / "report.md").read_text() == report


def test_a_probes_run_is_asked_in_accuracy(probe_run, capsys):
    """By default: what the model has none of is passed over."""
    code, out, err = door(capsys, probe_run, "--batches", 1)
    assert code == 0 and not err
    rows = Ledger(probe_run / "ablation" / "ablation.jsonl").rows
    assert [(row["part"], row["place"]) for row in rows] == [("layers", "0.0.0"), ("writes", "0.0.0")]
    assert {row["measure"] for row in rows} == {"accuracy"} and all(0 <= row["whole"] <= 1 for row in rows)
    assert "accuracy without it" in (probe_run / "ablation" / "report.md").read_text()


def test_what_is_wrong_is_said_in_a_line(run, probe_run, capsys, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.py", bare)
    for arguments, message in (
        ([bare], "has no checkpoint yet: train it first"),
        ([run, "--parts", "tables", "layer"], "there is no part 'layer': they are layers, tables, writes, window"),
        ([run, "--batches", 0], "batches is 0: it must be at least 1"),
        ([run, "--step", 2], "2"),
        ([run, "--rows", 2], "there is no field --rows"),
        ([probe_run, "--parts", "tables"], "this model looks nothing up: there are no tables"),
        ([probe_run, "--parts", "layers", "window"], "no layer of this model has a window"),
    ):
        code, _, err = door(capsys, *arguments, "--folder", tmp_path / "out")
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        ablate.main([str(run), "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert ended.value.code == 0 and "layers, tables, writes, window; none for all that the model has" in said

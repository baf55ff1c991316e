"""probe.py: small models trained on probes and reported, trained models asked in text; stopped, and gone on with."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import probe
from layers.layer import Tokens
from models.lm import LM, Stage
from probes import asking, matrix, report, text, trial
from probes.bottleneck import Bottleneck
from probes.small_runs import Ledger
from probes.tasks.task import discover
from training.run import load_model

SMOKE = ["--probes", "mqar@smoke", "--steps", "2", "--seeds", "1"]


def ask(capsys, *arguments):
    code = probe.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_lists_all_there_is(capsys):
    code, out, _ = ask(capsys, "--help")
    assert code == 0
    for name in [*text.FORMS, *asking.memories(), *(n for n in discover() if "@" not in n)]:
        assert f" {name}" in out
    with pytest.raises(SystemExit) as ended:
        probe.main(["GatedDeltaNet", "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--layer.H INT" in said and "--seeds INT models of each kind (default: 3)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Gated"], "there is no run, config or layer 'Gated': did you mean GatedConv"),
        (["GatedDeltaNet", "--probes", "mqr"], "there is no probe 'mqr': did you mean mqar?"),
        (
            ["GatedDeltaNet", "Atention"],
            "there is no layer 'Atention' (several names must all be layers): did you mean Att",
        ),
        (["GatedDeltaNet", "--layer.Q", "3"], "there is no field --layer.Q"),
        (["GatedDeltaNet", "Attention", "--layer.H", "3"], "there is no field --layer.H"),
        (["GatedDeltaNet", "--layer.H", "many"], "--layer.H"),
        (["GatedDeltaNet", "--seeds", "0"], "seeds is 0: it must be at least 1"),
        (["GatedDeltaNet", "--steps", "-1"], "steps is -1: it must be above 0"),
        (["--probes", "mqar"], "the first argument is a run, a config or a layer, not '--probes'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys, tmp_path, arguments, message):
    extra = ["--folder", tmp_path] if arguments[0] != "--probes" else []
    code, _, err = ask(capsys, *arguments, *extra)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_of_finer_bins_are_shown_in_the_fewest():
    """Rows of an older version told questions apart more finely."""

    def bins(*edges, right):
        return [
            {"low": low, "high": high, "questions": 10 * (1 + n), "accuracy": share}
            for n, ((low, high), share) in enumerate(zip(edges, right, strict=True))
        ]

    coarse = bins((0, 1), (2, 3), (5, 5), right=(0.1, 0.2, 0.3))
    fine = bins((0, 0), (1, 1), (2, 2), right=(1.0, 0.25, 0.5))
    assert report._within(coarse, coarse) == pytest.approx([0.1, 0.2, 0.3])
    assert report._within(fine, coarse) == [pytest.approx((10 * 1.0 + 20 * 0.25) / 30), 0.5, None]


def test_small_models_are_trained_asked_and_reported(capsys, tmp_path, monkeypatch):
    """Two layers, one of them changed; the same command again trains nothing and writes the same report."""
    code, out, _ = ask(capsys, "LinearAttention", *SMOKE, "--layer.H", 2, "--D", 16, "--folder", tmp_path)
    assert code == 0 and "LinearAttention H=2, seed 0" in out
    (row,) = Ledger(tmp_path / "probe.jsonl").rows
    assert (row["steps"], row["tokens"], row["rows_trained"]) == (2, 2 * 64 * 32, 128)
    assert [score["rows"] for score in row["scores"]] == [128]
    assert row["scores"][0]["law"] == "MQAR(vocab=256, length=32, pairs=4, filler='conflict_free', order='drawn', " + (
        "exponent=0.01, passes=1, again='same') v1"
    )
    assert set(row["scores"][0]["by"]) == {"pair", "slot", "distance"} and 0 <= row["accuracy"] <= 1
    # Each of 2 heads: a state of 8 x 8 and a normaliser of 8; a tail of 2 tokens of the convolution before it.
    assert row["state_bytes"] == {"32": 4 * (2 * (8 * 8 + 8) + 2 * 16)}
    assert row["command"].startswith("python probe.py LinearAttention --probes mqar@smoke")
    said = (tmp_path / "report.md").read_text()
    assert "| LinearAttention H=2 |" in said and row["command"] in said and "*plateau*" in said
    pictures = {path.name for path in tmp_path.iterdir()} - {"probe.jsonl", "report.md"}
    assert pictures == {
        f"mqar-smoke{by}{dark}.{kind}" for by in ("", "-by") for dark in ("", "-dark") for kind in ("png", "svg")
    }
    svg = (tmp_path / "mqar-smoke-by.svg").read_text()
    assert all(f">{name}<" in svg for name in ("distance", "pair", "slot", "LinearAttention H=2"))
    monkeypatch.setattr(trial, "SmallRun", None)
    code, again, _ = ask(capsys, "LinearAttention", *SMOKE, "--layer.H", 2, "--D", 16, "--folder", tmp_path)
    assert code == 0 and "seed 0" not in again and (tmp_path / "report.md").read_text() == said


def test_a_row_that_was_cut_short_is_done_again(capsys, tmp_path):
    path = tmp_path / "probe.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b')
    assert Ledger(path).rows == [{"a": 1}] and path.read_text() == '{"a": 1}\n'
    path.write_text('{"a": 1}')
    Ledger(path).add(a=2)
    assert Ledger(path).rows == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1\n{"a": 2}\n')
    code, _, err = ask(capsys, "GLA", *SMOKE, "--folder", tmp_path)
    assert code == 2 and "probe.jsonl, line 1: no row of JSON" in err and err.count("\n") == 1


def test_a_configs_model_takes_the_words_of_a_task():
    made = discover()["mqar@smoke"]
    experiment = asking.load(asking.locate("engram"))
    model = trial.adapted(experiment.model, made)
    words = {layer.W for stage in model.stages for layer in stage.pattern if hasattr(layer, "W")}
    assert model.W == 256 and words == {256} and len(model.stages) == len(experiment.model.stages)
    one, two = (trial.Attempt("x", model, "mqar@smoke", made, optimizer) for optimizer in (trial.usual(made),) * 2)
    assert one.config == two.config != trial.Attempt("x", experiment.model, "m", made, trial.usual(made)).config


def test_a_bottleneck_speaks_from_the_last_vector_alone():
    """The same last vector, the same row: tokens before it matter through it, and padding after it does not."""
    from flax import nnx

    from layers.linear import LinearAttention

    model = Bottleneck(W=20, D=16, stages=(Stage((LinearAttention(H=2, K=4, V=4),)),)).build(rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 12)), jnp.int32)
    pos = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    whole = model.hidden(Tokens(ids, pos)).y_BTD
    assert whole.shape == (2, 12, 16)
    cut = model.hidden(Tokens(ids, jnp.where(pos < 9, pos, -1))).y_BTD
    alone = model.hidden(Tokens(ids[:, :9], pos[:, :9])).y_BTD
    np.testing.assert_allclose(cut[:, :9], alone, atol=1e-5)
    assert float(jnp.max(jnp.abs(cut - whole))) > 1e-3
    some = model.hidden(Tokens(ids, pos), at_BN=jnp.array([[3, 7], [0, 1]])).y_BTD
    np.testing.assert_allclose(some[0], whole[0, jnp.array([3, 7])], atol=1e-5)
    last = LM.build(model.config, rngs=nnx.Rngs(0)).hidden(Tokens(ids, pos)).y_BTD[:, -1:]
    from probes.bottleneck import sincos

    z = last + sincos(pos, 16)  # [2, 1, 16] + [2, 12, 16]
    by_hand = jnp.einsum("BTF,FD->BTD", _gelu(jnp.einsum("BTD,DF->BTF", z, model.up.w[...])), model.down.w[...])
    np.testing.assert_allclose(whole, by_hand, atol=1e-5)
    with pytest.raises(ValueError, match="a row is read whole"):
        model.hidden(Tokens(ids, pos), ())


def _gelu(x):
    return 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    tiny.trained(folder, "run", train__steps=4)
    return folder / "run"


def test_a_trained_model_is_asked_in_text(run, capsys, tmp_path, monkeypatch):
    flags = ["--lengths", 256, 500, "--rows", 8, "--batch", 4, "--folder", tmp_path]
    code, out, _ = ask(capsys, run, *flags, "--probes", "passkey", "read_twice")
    assert code == 0 and "passkey, 256 tokens" in out
    rows = Ledger(tmp_path / "probe.jsonl").rows
    assert [(row["probe"], row["length"]) for row in rows] == [
        (form, T) for form in ("passkey", "read_twice") for T in (256, 500)
    ]
    for row in rows:
        assert row["step"] == 4 and row["rows"] == 8 and 0 <= row["accuracy"] <= 1 and row["nats"] > 0
        assert row["trained_length"] == 16 and len(row["by_depth"]) == (8 if row["probe"] == "passkey" else 1)
    assert len({row["state_bytes"] for row in rows}) == len({row["temporary_bytes"] for row in rows}) == 1  # bounded
    said = (tmp_path / "report.md").read_text()
    assert "| passkey | 500 |" in said and "nats saved" in said
    assert {"lengths-dark.svg", "depths.png"} <= {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(text, "FORMS", {**text.FORMS, "passkey": None, "read_twice": None})
    code, again, _ = ask(capsys, run, *flags, "--probes", "passkey", "read_twice")
    assert code == 0 and "passkey, 256" not in again and (tmp_path / "report.md").read_text() == said
    code, out, _ = ask(
        capsys, run, "--lengths", 256, "--rows", 8, "--twice", "--folder", tmp_path, "--probes", "needle"
    )
    row = Ledger(tmp_path / "probe.jsonl").rows[-1]
    assert code == 0 and row["twice"] and "| needle, twice | 256 |" in (tmp_path / "report.md").read_text()
    code, _, err = ask(capsys, run, "--probes", "mqar")
    assert code == 2 and "there is no probe 'mqar' in text" in err
    code, out, err = ask(capsys, run, "--probes", "order", "--lengths", 20, "--folder", tmp_path / "short")
    assert code == 2 and "too short for two passages" in out and "--lengths" in err


def test_rows_of_text_are_what_they_say(run):
    """Read as a person would: the answer stands where the depth says, once, and the row is as long as asked."""
    _, _, dataset = load_model(run)
    source = text.Source(dataset)
    for index in range(16):
        for form in text.FORMS:
            row = text.FORMS[form](source, 3, index, 400)
            assert row == text.FORMS[form](source, 3, index, 400)
            whole = row.before + row.answer
            assert len(whole) == 400 if form in ("passkey", "needle", "copying", "order") else len(whole) <= 400
            said, answer = dataset.decode(np.array(row.before[1:])), dataset.decode(np.array(row.answer))
            if form == "passkey":
                assert said.count(answer) == 2 and said.endswith("The pass key is ")
                start, question = said.find("\n# The pass key is"), "\n# What is the pass key? The pass key is "
                end = said.find("is the pass key.\n") + len("is the pass key.\n")
                room = len(said) - (end - start) - len(question)
                assert start == round((row.depth + 0.5) / 8 * room)
            elif form == "needle":
                name = said.rpartition("assert ")[2].removesuffix(" == ")
                planted = re.findall(r"\n[A-Z]+ = [0-9]{7}\n", said)
                assert len(planted) == 4 and f"\n{name} = {answer}\n" in planted
                before, _, _ = said.partition(f"\n{name} = ")
                room = len(said) - sum(map(len, planted)) - len(f"\nassert {name} == ")
                others = sum(len(needle) for needle in planted if needle in before)
                assert len(before) - others == round((row.depth + 0.5) / 8 * room)
            elif form == "phonebook":
                book, _, asked = said.rpartition("\n\n")
                entries = dict(line.split(": ") for line in book.split("\n"))
                assert len(entries) == book.count("\n") + 1 and entries[asked.removesuffix(": ")] == answer
            elif form == "copying":
                letters, _, shown = said.rpartition("\n")
                assert letters.count(shown) == 1 and letters.split(shown)[1].startswith(answer) and len(answer) == 12
            elif form == "order":
                body, _, rest = said.rpartition("\n# Passage A: ")
                a, _, b = rest.removesuffix("\n# The first was passage ").partition("\n# Passage B: ")
                assert {answer, dataset.decode(np.array(row.other))} == {"A", "B"} and len(a) == len(b) == 20
                places = {"A": body.find(a), "B": body.find(b)}
                assert min(places.values()) >= 0 and places[answer] == min(places.values())
            else:
                assert answer == said


def test_pieces_of_reading_change_nothing(run):
    """Nats of an answer are those of the whole row at once, whatever the piece; shorter rows in a batch are padded."""
    model, _, dataset = load_model(run)
    source = text.Source(dataset)
    rows = [text.passkey(source, 0, 0, 250), text.passkey(source, 0, 1, 203)]
    pairs = [(row.before, row.answer) for row in rows]
    one, two = text.Reader(model, piece=64)(pairs), text.Reader(model, piece=256)(pairs)
    np.testing.assert_allclose(one[0], two[0], atol=1e-4)
    for n, (before, answer) in enumerate(pairs):
        ids = jnp.asarray([before + answer], jnp.int32)
        pos = jnp.arange(ids.shape[1] - 1, dtype=jnp.int32)[None]
        logits = model(Tokens(ids[:, :-1], pos)).y_BTD[0, -5:]
        nll = -np.asarray(logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True)))[np.arange(5), answer]
        np.testing.assert_allclose(one[0][n], nll, atol=1e-3)


def test_pictures_are_the_same_each_time(tmp_path):
    draw = matrix.matrix(
        "A title", {"by": ["1", "2"]}, {"one": {"by": [(0.5, 0.1), None]}, "two": {"by": [(1.0, 0), (0.0, 0)]}}
    )
    matrix.both(draw, tmp_path / "a")
    once = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    matrix.both(draw, tmp_path / "a")
    assert once == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} and len(once) == 2
    assert [matrix._short(x) for x in (0.0, 0.25, 0.996, 1.0)] == [".00", ".25", ".99", "1"]
    assert matrix.cells([[1, None], [0, None]]) == [(0.5, 0.5), None]

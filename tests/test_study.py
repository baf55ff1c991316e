"""Studies: cells of axes, matched; trained as grids, kept, stopped, resumed, extended."""

import dataclasses
import io
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import ablate
from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.linear import LinearAttention
from models.lm import LM, Stage
from probes import ablation
from probes.ablation import LEDGER, Stopped, Work, check_slices, opened, prepare, run
from probes.judge import ByQuestions, ByText
from probes.matching import Costs, resolve
from probes.small_runs import SmallRun
from probes.studies import Options, changed, find, study_files
from probes.study import Axis, Choice, Claim, Match, Reference, Study, axis, of_experiments
from probes.tasks.in_context import InContext
from probes.tasks.recall import MQAR
from probes.tasks.task import Part, Probe, discover
from probes.trial import experiment as trial
from training.data import Text
from training.experiment import AdamW, Experiment, Schedule, Train
from training.lock import RunLock
from training.settings import ConfigError, execute, replaced

ROOT = Path(__file__).parents[1]
LAW = MQAR(32, 16, 2, filler="conflict_free")
LINEAR = LinearAttention(H=2, K=4)
BASE = Experiment(
    description="A study's base.",
    model=LM(W=32, D=16, stages=(Stage((LINEAR,)),), tied=True),
    data=Probe(B=4, train=(Part(LAW),), test=(Part(LAW, 8),)),
    optimizer=AdamW(lr=1e-2, schedule=Schedule(warmup=2, shape="cosine")),
    train=Train(steps=8),
)
WIDTHS = axis("width", "model.D", (16, 24))
STUDY = Study("Is it kept?", BASE, (WIDTHS,), rates=(3e-3, 1e-2), seeds=2, checks=4)


def work(folder: Path, study: Study = STUDY, keep_seconds: float = 120.0) -> Work:
    console = Console(file=io.StringIO())
    ledger = opened(folder / LEDGER)
    return Work(study, "a study", prepare(study), ledger, folder, "python ablate.py x", console, keep_seconds)


def numbers(rows: list[dict]) -> list[dict]:
    """Rows as a file holds them, without what the clock says."""
    return json.loads(json.dumps([{k: v for k, v in row.items() if "seconds" not in k} for row in rows]))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Path:
    """Of STUDY, trained without a break."""
    mine = work(tmp_path_factory.mktemp("finished"))
    assert run(mine) == 8
    return mine.folder / LEDGER


@pytest.fixture(scope="module")
def finished(ledger) -> list[dict]:
    """Its rows."""
    return numbers(opened(ledger, writable=False).rows)


# On paper.


def test_cells_are_all_combinations_and_know_their_names():
    layers = axis("memory", "model.stages.0.pattern.0", {"linear": LINEAR, "attention": Attention(H=2)})
    study = dataclasses.replace(STUDY, axes=(layers, WIDTHS))
    assert [cell.name for cell in study.cells] == ["linear, 16", "linear, 24", "attention, 16", "attention, 24"]
    last = study.cells[-1].experiment
    assert last.model.D == 24 and last.model.stages[0].pattern == (Attention(H=2),)
    assert [(a.seed, a.rate) for a in study.arms(study.cells[0])] == [(0, 3e-3), (0, 1e-2), (1, 3e-3), (1, 1e-2)]
    assert [a.rate for a in dataclasses.replace(study, rates=()).arms(study.cells[0])] == [1e-2, 1e-2]


def test_a_digest_is_of_what_results_depend_on():
    (cell, _), digest = STUDY.cells, STUDY.cells[0].digest(STUDY, "data")

    def other(study: Study = STUDY, data: str = "data", **fields) -> bool:
        experiment = cell.experiment
        for path, value in fields.items():
            experiment = replaced(experiment, path.replace("__", "."), value)
        return dataclasses.replace(cell, experiment=experiment).digest(study, data) != digest

    assert other(model__D=32) and other(data__B=8) and other(optimizer__b2=0.9) and other(train__steps=9)
    assert other(dataclasses.replace(STUDY, goal=0.5)) and other(dataclasses.replace(STUDY, checks=2))
    assert other(data="of another law")
    assert not other(description="Said otherwise.") and not other(train__seed=3)
    assert not other(dataclasses.replace(STUDY, seeds=9, rates=(1.0,), about="?"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"axes": ()}, "Study.axes is empty"),
        ({"seeds": 0}, "Study.seeds is 0"),
        ({"rates": (0.0,)}, "must be above 0"),
        ({"versus": "depth"}, r"state_bytes or an axis \(width\)"),
        ({"within": "depth"}, r"Study.within is 'depth': it must be an axis \(width\)"),
        ({"axes": (Axis("width", (Choice("a"), Choice("a"))),)}, "two choices named 'a'"),
        ({"axes": (axis("width", "model.width", (1,)),)}, "no field 'width' in LM .it has W, D"),
        ({"axes": (axis("width", "model.stages.1.repeats", (1,)),)}, r"no field '1' in tuple \(it has 0 to 0\)"),
        ({"axes": (axis("keys", "model.stages.0.pattern.0.H", (0,)),)}, "LinearAttention.H is 0"),
        (
            {"claims": (Claim("?", "a paper", more="16", less="17"),)},
            "a claim names the cell '17': cells are 16; 24|24",
        ),
    ],
)
def test_what_a_study_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(STUDY, **fields)


# Matched.


def counted(experiment: Experiment) -> int:
    model = jax.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(0)))
    return sum(math.prod(p.shape) for p in jax.tree.leaves(model))


def test_parameters_are_matched_as_closely_as_sizes_allow():
    memories = {"linear": LINEAR, "gated delta": GatedDeltaNet(H=2)}
    widths = tuple(range(8, 41, 2))
    study = Study(
        "?",
        BASE,
        (axis("memory", "model.stages.0.pattern.0", memories),),
        match=(Match("parameters", ("model.D",), widths),),
    )
    first, second = resolve(study, lambda e: ablation.dataset_of(e.data))
    target = counted(BASE)
    assert first.cell.experiment == BASE and first.matched[0].chosen is None and first.matched[0].off == 0
    counts = {}
    for D in widths:
        try:
            counts[D] = counted(replaced(study.cells[1].experiment, "model.D", D))
        except ValueError:  # 3/4 of D is not whole for each head
            continue
    assert 0 < len(counts) < len(widths)
    best = min(counts, key=lambda D: abs(counts[D] - target))
    assert second.cell.experiment.model.D == best == second.matched[0].chosen
    assert second.matched[0].value == counts[best] == second.costs["parameters"]
    assert second.matched[0].off == counts[best] / target - 1


def test_state_is_matched_by_a_field_of_the_choice():
    by = Match("state_bytes", ("model.stages.0.pattern.0.K",), tuple(range(1, 17)))
    choices = (
        Choice("window", (("model.stages.0.pattern.0", Attention(H=2, window=8)),)),
        Choice("linear", (("model.stages.0.pattern.0", LINEAR),), by=(by,)),
    )
    match = Match("state_bytes", ("model.D",), (16,))
    study = Study("?", BASE, (Axis("memory", choices),), match=(match,))
    first, second = resolve(study, lambda e: ablation.dataset_of(e.data))

    def held(experiment: Experiment) -> int:
        state = jax.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(0)).init_state(1, 16))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))

    assert first.costs["state_bytes"] == held(first.cell.experiment)
    assert second.costs["state_bytes"] == held(second.cell.experiment)
    errors = {}
    for K in range(1, 17):
        errors[K] = abs(held(replaced(study.cells[1].experiment, by.fields[0], K)) - first.costs["state_bytes"])
    assert errors[second.matched[0].chosen] == min(errors.values())
    with pytest.raises(ConfigError, match=r"linear: no value of D in Match.values makes a model: .*D = 15"):
        none = (choices[0], dataclasses.replace(choices[1], by=(Match("state_bytes", ("model.D",), (15,)),)))
        resolve(dataclasses.replace(study, axes=(Axis("memory", none),)), lambda e: ablation.dataset_of(e.data))


# Trained, and kept.


def test_an_arm_is_what_it_is_alone(finished):
    rows = [row for row in finished if row["cell"] == "16" and row["arm"]["seed"] == 1]
    assert [row["arm"]["rate"] for row in rows] == [3e-3, 1e-2]
    data = BASE.data.build()
    for row in rows:
        optimizer = dataclasses.replace(BASE.optimizer, lr=row["arm"]["rate"])
        alone = SmallRun(BASE.model, data, optimizer, 8)
        asked = ByQuestions(data)
        curve = [(done, loss, asked.validate(alone.answers(params))) for done, params, loss in alone.train(1, 2)]
        np.testing.assert_allclose(row["curve"], curve, atol=1e-5)
        *_, (_, params, _) = alone.train(1, 8)
        assert row["test"] == asked.test(alone.answers(params)).value
        assert row["validation"] == curve[-1][2] and row["steps"] == 8 and row["goal_step"] is None
    assert rows[0]["scores"][0]["rows"] == 8 and rows[0]["parameters"] == counted(BASE)


def test_a_finished_study_trains_nothing(finished, tmp_path, monkeypatch):
    (tmp_path / LEDGER).write_text("".join(json.dumps(row) + "\n" for row in finished))
    monkeypatch.setattr(ablation, "program", None)
    assert run(work(tmp_path)) == 0


def test_the_command_trains_what_is_missing_and_reports_and_then_trains_nothing(ledger, tmp_path, monkeypatch, capsys):
    """From half a ledger to the report, as a user has it; the second call takes seconds and changes no byte."""
    study, folder = tmp_path / "kept.py", tmp_path / "out"
    study.write_text("from test_study import STUDY\n\ntiers = {'laptop': STUDY}\n")
    folder.mkdir()
    (folder / LEDGER).write_text("".join(ledger.read_text().splitlines(keepends=True)[:4]))
    assert ablate.main([str(study), "--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "24: 4 arms, accuracy" in said and f"written: {folder}/report.md" in said.replace("\n", "")
    assert told(folder / LEDGER) == told(ledger)
    report = (folder / "report.md").read_text()
    assert "2 cells were trained, 8 of 8 arms" in report and (folder / "report.html").is_file()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(ablation, "program", None)
    since = time.perf_counter()
    assert ablate.main([str(study), "--folder", str(folder)]) == 0 and time.perf_counter() - since < 20
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def told(path: Path) -> list:
    """What training gave, of each arm."""
    rows = opened(path, writable=False).rows
    return sorted(([row["digest"], *row["arm"].values(), row["test"], row["curve"]] for row in rows), key=str)


def test_workers_train_the_same(ledger, tmp_path, capsys, monkeypatch):
    """Two processes, a cell each: rows, and the commands that make them again, are those of one."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    study, folder = tmp_path / "kept.py", tmp_path / "out"
    study.write_text("from test_study import STUDY\n\ntiers = {'laptop': STUDY}\n")
    assert ablate.main([str(study), "--folder", str(folder), "--workers", "2"]) == 0
    assert "2 cells were trained, 8 of 8 arms" in (folder / "report.md").read_text()
    for row, whole in zip(told(folder / LEDGER), told(ledger), strict=True):
        assert row[:-2] == whole[:-2]
        np.testing.assert_allclose(row[-1], whole[-1], atol=1e-5)
    commands = {row["command"] for row in opened(folder / LEDGER, writable=False).rows}
    assert commands == {f"python ablate.py {study} --only {width}" for width in (16, 24)}
    assert not (folder / ablation.UNFINISHED).exists()
    capsys.readouterr()
    assert ablate.main([str(study), "--folder", str(folder), "--workers", "99"]) == 2
    assert "workers is 99: give 1 to " in capsys.readouterr().err


def test_a_study_that_is_extended_trains_what_is_missing(finished, tmp_path):
    (tmp_path / LEDGER).write_text("".join(json.dumps(row) + "\n" for row in finished))
    mine = work(tmp_path, dataclasses.replace(STUDY, seeds=3))
    assert run(mine, only=["24"]) == 2 and len(mine.ledger.rows) == 10
    assert {(row["cell"], row["arm"]["seed"]) for row in mine.ledger.rows[8:]} == {("24", 2)}


def test_a_stopped_study_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    """At whatever step the signal comes, also before the first, and more than once."""
    asked = itertools.count()

    class Impatient(ablation.Stop):
        requested = property(lambda self: "SIGTERM" if next(asked) % 7 == 6 else None, lambda self, value: None)  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "Stop", Impatient)
        for stops in range(30):  # noqa: B007  (counted below)
            try:
                run(work(tmp_path))
            except Stopped as signal_:
                assert str(signal_) == "SIGTERM"
            else:
                break
    assert 2 <= stops < 29
    assert numbers(opened(tmp_path / LEDGER).rows) == finished
    assert not (tmp_path / ablation.UNFINISHED).exists()


def test_a_program_whose_rows_were_cut_short_is_done_again(finished, tmp_path):
    lines = [json.dumps(row) + "\n" for row in finished]
    (tmp_path / LEDGER).write_text("".join(lines[:6]) + lines[6][:100])
    mine = work(tmp_path)
    assert len(mine.ledger.rows) == 4 and len((tmp_path / LEDGER).read_text().splitlines()) == 4
    assert run(mine) == 4 and numbers(mine.ledger.rows) == finished


def test_a_look_at_a_study_changes_nothing(finished, tmp_path, capsys):
    """Another program may be writing there: a dry run neither mends its ledger nor makes a folder."""
    lines = [json.dumps(row) + "\n" for row in finished]
    path = tmp_path / LEDGER
    path.write_text("".join(lines[:6]) + lines[6][:100])
    before = path.read_bytes()
    assert len(opened(path, writable=False).rows) == 4 and path.read_bytes() == before
    absent = tmp_path / "absent"
    assert ablate.main(["memory_layers_smoke", "--dry-run", "--folder", str(absent)]) == 0
    assert "4 of 4" in capsys.readouterr().out and not absent.exists()


def test_a_study_under_way_is_not_touched_by_another(finished, tmp_path, capsys):
    """The second one reads nothing before it has the lock."""
    path = tmp_path / LEDGER
    path.write_text(json.dumps(finished[0]) + "\n")  # of a program of four
    before = path.read_bytes()
    with RunLock(tmp_path):
        assert ablate.main(["memory_layers_smoke", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is in use by process" in error and error.count("\n") == 1 and path.read_bytes() == before


def test_arms_of_few_at_a_time_are_the_same(finished, tmp_path):
    mine = work(tmp_path, dataclasses.replace(STUDY, together=3))
    run(mine, only=["16"])
    assert [row["program"] for row in mine.ledger.rows] == [3, 3, 3, 1]
    for row, whole in zip(mine.ledger.rows, finished[:4], strict=True):
        np.testing.assert_allclose(row["curve"], whole["curve"], atol=1e-5)


def test_an_arm_stops_where_it_reaches_the_goal(tmp_path):
    """Each where it is: what its fellows do changes nothing."""
    study = dataclasses.replace(STUDY, axes=(axis("width", "model.D", (16,)),), goal=0.0, rates=(1e-2,))
    mine = work(tmp_path, study)
    run(mine)
    assert [(row["steps"], row["goal_step"], len(row["curve"])) for row in mine.ledger.rows] == [(2, 2, 1)] * 2


_KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_study import work
from probes.ablation import run
print("ready", flush=True)
run(work(Path(sys.argv[1]), keep_seconds=0.0))
"""


def test_kill_at_any_time(finished, tmp_path):
    """SIGKILL while programs compile, train, save and are written down: the rows are those of an unbroken study."""
    moments = np.random.default_rng(0).uniform(0.5, 6.0, 3)
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.kill()
        process.communicate()
    mine = work(tmp_path)
    run(mine)
    assert numbers(mine.ledger.rows) == finished


def test_text_is_chosen_by_other_batches_than_it_is_tested_by(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"{n} bottles of beer on the wall, {n} bottles of beer. " * 20)
    text = Text(T=32, B=4, source=str(tmp_path / "text"), held_out=0.2, store=str(tmp_path / "store"))
    data = text.build()
    every = list(data.held_out(6))
    mine = ByText(data, 6)
    uniform = {1: 0.25, 2: 0.5}

    def answers(batch, labelled):
        assert labelled is None
        nats = np.where(batch.labels_BT >= 0, np.log(2) * uniform[1 + any(batch is b for b in mine._tests)], 0.0)
        return batch.labels_BT, nats

    assert not mine.higher and len(mine._validation) == len(mine._tests) == 3
    assert {b.ids_BT.tobytes() for b in mine._validation} | {b.ids_BT.tobytes() for b in mine._tests} == {
        b.ids_BT.tobytes() for b in every
    }
    assert mine.validate(answers) == pytest.approx(0.25) and mine.test(answers).value == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="at least 2 held-out batches"):
        ByText(data, 1)


# Asked for.


@pytest.mark.parametrize("name", study_files())
def test_every_shipped_study_can_be_prepared(name):
    """The smoke tier of each: its cells build and match. Of the others: claims name cells, experiments are valid."""
    tiers = execute(study_files()[name]).tiers
    assert set(tiers) == {"smoke", "laptop", "paper"} or name == "memory_layers_smoke"
    for tier, study in tiers.items():
        assert study.cells and study.about.endswith("?")
        check_slices(study)
        if tier == "laptop":
            assert study.seeds >= 2 and study.claims and study.notes
    cells = prepare(tiers["smoke"])
    assert all(abs(m.off) < 0.25 for resolved in cells for m in resolved.matched)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in study_files() if name != "memory_layers_smoke"])
def test_larger_tiers_can_be_prepared(name):
    for tier in ("laptop", "paper"):
        study = execute(study_files()[name]).tiers[tier]
        if study.base.data.__class__ is Text and study.base.data.tokenizer != "bytes":
            continue  # its text and tokenizer are the user's to put there
        assert all(abs(m.off) < 0.1 for resolved in prepare(study) for m in resolved.matched)


def test_studies_are_found_by_name(tmp_path):
    study, title = find("memory_layers_smoke")
    assert title == "memory_layers_smoke@smoke" and study.seeds == 2
    for name, message in (
        ("memory_layer_smoke", "did you mean memory_layers_smoke"),
        ("memory_layers_smoke@huge", "has no tier 'huge': it has smoke"),
        ("nothing.py", "there is no study 'nothing.py'"),
    ):
        with pytest.raises(ConfigError, match=message):
            find(name)
    (tmp_path / "mine.py").write_text("tiers = {}")
    with pytest.raises(ConfigError, match="it has no `tiers`"):
        find(str(tmp_path / "mine.py"))


def test_mad_replaces_the_mixer_of_each_block_and_leaves_the_mlp():
    for tier, study in execute(study_files()["mad_lite"]).tiers.items():
        kinds = [[type(layer).__name__ for layer in cell.experiment.model.stages[0].pattern] for cell in study.cells]
        assert all(kind[-1] == "MLP" for kind in kinds)
        assert {kind[-2] for kind in kinds} == {type(choice.changes[0][1]).__name__ for choice in study.axes[1].choices}
        assert {len(kind) for kind in kinds} == {2 if tier == "paper" else 3}, "a convolution before it, or none"


def test_a_claim_about_what_is_not_asked_is_refused():
    law = dataclasses.replace(LAW, length=24)
    base = dataclasses.replace(BASE, data=Probe(B=4, train=(Part(LAW),), test=(Part(LAW, 8), Part(law, 8))))
    check_slices(dataclasses.replace(STUDY, base=base, claims=(Claim("", "", "16", "24", slice="length 24"),)))
    with pytest.raises(ConfigError, match="'16' is read at 'length 64', but is asked length 16; length 24"):
        prepare(dataclasses.replace(STUDY, base=base, claims=(Claim("", "", "16", "24", slice="length 64"),)))
    for at, message in (({"at": 1}, "names the choice '17'"), ({}, "names the cell '17'")):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(STUDY, claims=(Claim("", "", "16", "17", **at),))
    for point in (Reference("x", 0.5, 10, "17"), Reference("x", 0.5, None, "16")):
        with pytest.raises(ConfigError, match="must be a choice of an axis, and the reference needs state_bytes"):
            dataclasses.replace(STUDY, references=(point,))


def test_what_a_bottleneck_adds_counts():
    """Its decoder is trained, so its parameters and arithmetic are a cell's, too: two matrices of D x 4 D."""
    tasks = {name: trial(Attention(H=2), discover()[f"mad_{name}@smoke"]) for name in ("compress", "recall")}
    compress, recall = (Costs(experiment, experiment.data.build()) for experiment in tasks.values())
    D, words = 64, tasks["recall"].model.W - tasks["compress"].model.W
    assert compress("parameters") - recall("parameters") == 8 * D**2 - D * words


def test_what_trains_on_every_token_is_chosen_by_its_answers():
    law = InContext(vocab=8, length=16, targets="all")
    (part, _), *others = ByQuestions(Probe(B=4, train=(Part(law, 8),), test=(Part(law, 8),)).build())._validation
    assert part.task == dataclasses.replace(law, targets="asked") and not others


def test_steps_are_those_of_every_task():
    tasks = of_experiments("task", {"one": BASE, "two": dataclasses.replace(BASE, train=Train(steps=20))})
    study = changed(dataclasses.replace(STUDY, axes=(tasks, WIDTHS)), Options(steps=3))
    assert {cell.experiment.train.steps for cell in study.cells} == {3} == {study.base.train.steps}


def test_options_change_a_study():
    study = changed(STUDY, Options(seeds=5, steps=3, rates=(1.0,), together=2, only=("24",)))
    assert (study.seeds, study.base.train.steps, study.rates, study.together) == (5, 3, (1.0,), 2)
    with pytest.raises(ConfigError, match="only names the cell '244', which the study has not: did you mean '24'"):
        changed(STUDY, Options(only=("244",)))
    with pytest.raises(ConfigError, match="steps is 0"):
        changed(STUDY, Options(steps=0))

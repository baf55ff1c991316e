"""Frozen facts: what a row says is what was drawn once; and the studies of small runs, whole but small."""

import json

import numpy as np
import pytest
from rich.console import Console
from said import completed, near

from layers.engram import Engram
from layers.linear import LinearAttention
from models.lm import LM, Stage
from probes import based_study, chunk_study, engram_study, mixture_study
from probes.small_runs import Ledger
from probes.tasks.dances import Dances
from probes.tasks.facts import Facts
from training.data import NOT_ASKED, DataError


def test_the_label_is_the_fact():
    law = Facts(length=24, vocab=5)
    known: dict[tuple[int, int], int] = {}
    for rows in (law.rows(0, np.arange(8)), law.rows(9, np.arange(8))):
        for ids, labels in zip(rows.ids_NT.reshape(-1, 3), rows.labels_NT.reshape(-1, 3), strict=True):
            assert known.setdefault((ids[0], ids[1]), ids[2]) == ids[2] == labels[1]
            assert labels[0] == labels[2] == NOT_ASKED
        assert not rows.about
    assert len(known) == 25 and len(set(known.values())) > 2
    assert (Facts(vocab=5, facts=1).facts_WW != law.facts_WW).any()


def test_what_cannot_be():
    with pytest.raises(DataError, match="Facts.length is 10"):
        Facts(length=10)
    with pytest.raises(DataError, match="Facts.vocab is 1"):
        Facts(vocab=1)
    with pytest.raises(DataError, match="Dances.names is 3"):
        Dances(names=3)


@pytest.mark.slow
def test_studies_are_written_and_go_on(tmp_path, monkeypatch):
    """What is in the ledger is not trained again; a picture and a table are made of it."""
    console = Console(quiet=True)
    small = LM(W=64, D=16, stages=(Stage((LinearAttention(H=1, K=4),)),))
    looked_up = LM(W=64, D=16, stages=(*small.stages, Stage((Engram(W=64, H=1, K=4, rows=50),))))
    monkeypatch.setattr(engram_study, "models", lambda: {"without": small, "Engram": looked_up})
    monkeypatch.setattr(engram_study, "TABLE", "1.0.0")
    ledger = Ledger(tmp_path / "study.jsonl")
    engram_study.study(ledger, 2, 1, console)
    again = Ledger(tmp_path / "study.jsonl")
    assert again.rows == ledger.rows and [row["name"] for row in again.rows] == ["without", "Engram"]
    assert all(0 <= row["accuracy"] <= 1 for row in again.rows) and "off" in again.rows[1]
    monkeypatch.setattr(engram_study, "SmallRun", None)
    engram_study.study(again, 2, 1, console)
    engram_study.report(again, tmp_path, 2, 1)
    assert (tmp_path / "facts.png").stat().st_size > 10_000
    assert len((tmp_path / "study.md").read_text().splitlines()) == 2 + 3


def trained_again(*_):
    raise AssertionError("what is in the ledger was trained again")


def test_a_mixture_study_is_read_from_its_ledger(tmp_path, monkeypatch):
    path = tmp_path / "study.jsonl"
    key = {"seed": 0, "steps": 3, "loss": 1.0}
    names, pairs = mixture_study.MIXERS, mixture_study.PAIRS
    rows = [key | {"name": name, "pairs": n, "accuracy": 0.5} for name in names for n in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(mixture_study, "SmallRun", trained_again)
    mixture_study.study(Ledger(path), 3, 1, Console(quiet=True))
    mixture_study.report(Ledger(path), tmp_path, 3, 1)
    table = (tmp_path / "study.md").read_text()
    assert "| one large | 512 | 8 | 0.500 | 0.000 |" in table and "| mixture | 512 | 8 |" in table


def test_studies_of_delays_and_of_state_are_read_from_their_ledgers(tmp_path, monkeypatch):
    key = {"seed": 0, "steps": 3, "loss": 1.0, "accuracy": 0.5}
    delays = [key | {"name": name, "delay": n} for name in chunk_study.MIXERS for n in chunk_study.DELAYS]
    small = {("window", 8): based_study.models()["window", 8]}  # bytes of the others take a second each
    monkeypatch.setattr(based_study, "models", lambda: small)
    # Two inputs of the convolution; keys, values and times of eight tokens, and two counts.
    state = 4 * (2 * 64 + 2 * 8 * 64 + 8 + 2)
    assert based_study.size_of(small["window", 8]) == state
    pairs = [key | {"name": "window", "size": 8, "state": state, "pairs": n} for n in based_study.PAIRS]
    for module, rows, line in (
        (chunk_study, delays, "| chunks |" + " 0.500 ± 0.000 |" * len(chunk_study.DELAYS)),
        (based_study, pairs, f"| window 8 | {state} |" + " 0.500 ± 0.000 |" * len(based_study.PAIRS)),
    ):
        path = tmp_path / "study.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(module, "SmallRun", trained_again)
        module.study(Ledger(path), 3, 1, Console(quiet=True))
        module.report(Ledger(path), tmp_path, 3, 1)
        assert line in (tmp_path / "study.md").read_text().splitlines()
    assert {path.name for path in tmp_path.glob("*.png")} == {"recall.png", "trade.png"}


@pytest.mark.slow
def test_studies_of_delays_and_of_state_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_study, "MIXERS", {"window": chunk_study.MIXERS["window"]})
    small = {("window", 8): based_study.models()["window", 8]}
    monkeypatch.setattr(based_study, "models", lambda: small)
    for module, asked in ((chunk_study, chunk_study.DELAYS), (based_study, based_study.PAIRS)):
        ledger = Ledger(tmp_path / f"{module.__name__}.jsonl")
        module.study(ledger, 2, 1, Console(quiet=True))
        assert [row.get("delay", row.get("pairs")) for row in ledger.rows] == list(asked)
        assert all(0 <= row["accuracy"] < 0.2 for row in ledger.rows)


@pytest.mark.parametrize("delay", [0, 5])
def test_a_dance_is_said_again(delay):
    law = Dances(dances=3, moves=4, names=7, vocab=20, delay=delay)
    rows = law.rows(1, np.arange(400))
    at = 3 * (5 + delay)
    assert rows.ids_NT.shape == (400, at + 4)
    guessed = []  # right by the dances that agree with what was said again
    for n, (ids, labels) in enumerate(zip(rows.ids_NT, rows.labels_NT, strict=True)):
        parts = ids[:at].reshape(3, -1)
        assert len(set(parts[:, 0])) == 3 and (parts[:, 0] < 8).all() and (parts[:, 0] > 0).all()
        assert (parts[:, 1:5] > 7).all() and not parts[:, 5:].any()
        which = list(parts[:, 0]).index(ids[at])
        np.testing.assert_array_equal(labels[at:], parts[which, 1:5])
        np.testing.assert_array_equal(ids[at + 1 :], parts[which, 1:4])
        assert (labels[:at] == NOT_ASKED).all()
        about = {name: values[n].tolist() for name, values in rows.about.items()}
        assert set(about) == {"answer", "depth", "distance"} and about["answer"] == [0] * 4
        guessed.append(np.mean(completed(parts[:, 1:5].tolist(), labels[at:].tolist())))
        assert about["depth"] == [which * (5 + delay) + 1 + i for i in range(4)]
        assert [d + e for d, e in zip(about["depth"], about["distance"], strict=True)] == [at + i for i in range(4)]
    near(guessed, law.plateau)

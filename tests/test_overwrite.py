"""Overwrite recall: the law of its rows, derived again from what the rows say; and its study, whole but small."""

import json
import random

import numpy as np
import pytest
from rich.console import Console
from said import near, rows_of

from layers.linear import LinearAttention
from probes import memory_study
from probes.tasks.overwrite import Overwrite
from training.data import NOT_ASKED, DataError


def test_the_label_is_what_the_key_was_told_last():
    rows = Overwrite(length=40, vocab=32, keys=5).rows(3, np.arange(8))
    for n, (ids, labels) in enumerate(zip(rows.ids_NT, rows.labels_NT, strict=True)):
        told: dict[int, tuple[int, int]] = {}
        gaps, numbers = [], []
        for t in range(0, 40, 2):
            key, value = ids[t], ids[t + 1]
            assert 1 <= key < 16 <= value < 32
            assert labels[t] == (told[key][0] if key in told else NOT_ASKED) and labels[t + 1] == NOT_ASKED
            if key in told:
                gaps.append(t - told[key][1])
                numbers.append(list(told).index(key))  # keys by their first telling
            told[key] = value, t
        assert len(told) <= 5
        distance, pair = rows.about["distance"][n], rows.about["pair"][n]
        assert distance[: len(gaps)].tolist() == gaps and (distance[len(gaps) :] == -1).all()
        assert pair[: len(gaps)].tolist() == numbers
    assert (rows.labels_NT != NOT_ASKED).sum() > 60


@pytest.mark.parametrize("law", [Overwrite(16, 256, 4), Overwrite(64, 256, 5)], ids=str)
def test_plateau(law):
    """Any key's current value, where all keys are told."""
    luck, hits = random.Random(0), []
    for row in rows_of(law, 1000):
        told, right = {}, []
        for t in range(0, law.length, 2):
            if len(told) == law.keys:
                right.append(luck.choice(list(told.values())) == row.labels[t])
            told[row.ids[t]] = row.ids[t + 1]
        hits.append(np.mean(right))
    near(hits, law.plateau)


def test_what_cannot_be():
    with pytest.raises(DataError, match="it must be even"):
        Overwrite(length=15)
    with pytest.raises(DataError, match="Overwrite.keys is 32"):
        Overwrite(keys=32)


def test_a_study_is_written_and_goes_on(tmp_path, monkeypatch):
    """Stopped after the first of four variants, and again: only the others are trained."""
    assert {v.figure for v in memory_study.variants()} == {"length", "parts", "chunk", "crossed"}
    mixer = LinearAttention(H=2, chunk=16)
    small = [
        memory_study.Variant("length", "Titans", mixer),
        memory_study.Variant("parts", "without", mixer),
        memory_study.Variant("chunk", "linear, chunk 8", mixer),
        memory_study.Variant("crossed", "trained at 16", mixer, chunks=(8, 16)),
    ]
    console = Console(quiet=True)
    monkeypatch.setattr(memory_study, "variants", lambda: small[:1])
    memory_study.study(tmp_path, 2, 2, console)
    trained, names = memory_study.trained, []
    monkeypatch.setattr(memory_study, "trained", lambda v, *a: names.append(v.name) or trained(v, *a))
    monkeypatch.setattr(memory_study, "variants", lambda: small)
    rows = memory_study.study(tmp_path, 2, 2, console)
    assert names == ["without", "linear, chunk 8", "trained at 16"]
    assert rows == [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 5 and {row["chunk"] for row in rows if row["figure"] == "crossed"} == {8, 16}
    assert len({row["accuracy"] for row in rows if row["figure"] == "crossed" and row["seed"] == 0}) == 1
    memory_study.pictures(rows, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"length.png", "parts.png", "crossed.png"}
    assert memory_study.table(rows).count("\n") == 1 + 5

"""Overwrite recall: the law of its rows, derived again from what the rows say; and its study, whole but small."""

import json

import numpy as np
import pytest
from rich.console import Console

from layers.linear import LinearAttention
from probes import memory_study
from probes.tasks.overwrite import Overwrite, gaps
from training.data import NOT_ASKED, DataError


def test_the_label_is_what_the_key_was_told_last():
    data = Overwrite(T=40, B=8, vocab=32, keys=5).build()
    batch = data.batch(3, 7)
    distance = gaps(batch)
    for ids, labels, gap in zip(batch.ids_BT, batch.labels_BT, distance, strict=True):
        told: dict[int, tuple[int, int]] = {}
        for t in range(0, 40, 2):
            key, value = ids[t], ids[t + 1]
            assert 1 <= key < 16 <= value < 32
            assert labels[t] == (told[key][0] if key in told else NOT_ASKED) and labels[t + 1] == NOT_ASKED
            assert gap[t] == (t - told[key][1] if key in told else 0)
            told[key] = value, t
        assert len(told) <= 5
    assert (batch.labels_BT != NOT_ASKED).sum() > 60


def test_rows_are_a_function_of_seed_and_step():
    data = Overwrite(T=16, B=6, tests=(16, 32), rows=8).build()
    np.testing.assert_array_equal(data.batch(0, 2).ids_BT[2:4], data.batch(0, 2, slice(2, 4)).ids_BT)
    assert (data.batch(0, 2).ids_BT != data.batch(1, 2).ids_BT).any()
    assert (data.batch(0, 2).ids_BT != data.batch(0, 3).ids_BT).any()
    held_out = list(data.held_out())
    assert [len(batch.ids_BT) for batch in held_out] == [6, 2, 6, 2]
    assert (held_out[0].pos_BT[:, 16:] == -1).all() and (held_out[2].pos_BT >= 0).all()


def test_what_cannot_be():
    with pytest.raises(DataError, match="it must be even"):
        Overwrite(T=15)
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

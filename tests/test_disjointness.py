"""Set disjointness: the law of its rows, derived again from what the rows say."""

import collections
import json

import numpy as np
import pytest
from rich.console import Console

from models.lm import LM, Stage
from probes import read_twice_study
from probes.small_runs import Ledger, SmallRun
from probes.tasks import disjointness
from probes.tasks.disjointness import Disjointness, mirrored
from training.data import NOT_ASKED, DataError

SMALL = {"B": 8, "vocab": 40, "sizes": mirrored((3, 7)), "tests": ((2, 5), (9, 1)), "rows": 10}


@pytest.mark.parametrize("reading", ["once", "twice", "ahead"])
def test_the_label_is_the_one_token_of_both_sets(reading):
    data = Disjointness(**SMALL, reading=reading).build()
    batches = [data.batch(seed, step) for seed, step in ((0, 0), (0, 1), (4, 6))] + list(data.held_out())
    sizes = [(3, 7), (7, 3), (3, 7), (2, 5), (9, 1), (2, 5), (9, 1)]
    assert [len(batch.ids_BT) for batch in batches] == [8, 8, 8, 8, 8, 2, 2]
    for batch, (m, n) in zip(batches, sizes, strict=True):
        for b, (ids, pos, labels) in enumerate(zip(*batch[:3], strict=True)):
            end = int((pos >= 0).sum())
            np.testing.assert_array_equal(pos, [*range(end), *[-1] * (len(pos) - end)])
            row = list(ids[:end])
            if reading == "twice":
                assert row[: end // 2] == row[end // 2 :]
                row = row[: end // 2]
            assert (row[0], row[1 + m], row[-1]) == (1, 2, 3) and len(row) == m + n + 3
            first, second = row[1 : 1 + m], row[2 + m : -1]
            assert len(set(first)) == m and len(set(second)) == n and min(first + second) >= 4
            shared = set(first) & set(second)
            assert len(shared) == 1 and labels[end - 1] in shared
            assert (np.delete(labels, end - 1) == NOT_ASKED).all()
            if reading == "ahead":
                np.testing.assert_array_equal(batch.prefix_BT[b], np.arange(len(pos)) < end - 1)
            else:
                assert batch.prefix_BT is None


def test_every_token_and_place_is_as_likely():
    """5,000 rows: each word in each set, the shared one at each place of either; all within 5 standard errors."""
    data = Disjointness(B=5000, vocab=14, sizes=((3, 4),), tests=((3, 4),), rows=1).build()
    batch = data.batch(1, 0)
    answer = batch.labels_BT[:, -1]
    places = [(batch.ids_BT[:, part] == answer[:, None]).argmax(1) for part in (slice(1, 4), slice(5, 9))]
    for found, options in ((answer - 4, 10), (places[0], 3), (places[1], 4), (batch.ids_BT[:, 1] - 4, 10)):
        count = np.bincount(found, minlength=options)
        assert len(count) == options
        assert (np.abs(count - 5000 / options) < 5 * np.sqrt(5000 / options)).all()
    assert collections.Counter(map(len, map(set, batch.ids_BT.tolist()))) == {9: 5000}


def test_rows_are_a_function_of_seed_and_index():
    data = Disjointness(**SMALL).build()
    for mine, theirs in zip(data.batch(0, 2, slice(2, 4))[:3], data.batch(0, 2)[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs[2:4])
    assert (data.batch(0, 2).ids_BT != data.batch(1, 2).ids_BT).any()
    assert (data.batch(0, 2).ids_BT != data.batch(0, 4).ids_BT).any()
    wide = Disjointness(**SMALL | {"B": 4}).build()  # the same rows in batches of another size
    np.testing.assert_array_equal(
        next(data.questions(2, 5)).ids_BT, np.concatenate([b.ids_BT for b in wide.questions(2, 5)])[:8]
    )
    twice = Disjointness(**SMALL, reading="twice").build()  # another reading, the same sets
    np.testing.assert_array_equal(twice.batch(0, 2).ids_BT[:, :13], data.batch(0, 2).ids_BT[:, :13])


def test_what_cannot_be():
    assert len(disjointness.PAPER_TRAIN) == 12 and len(disjointness.PAPER_TEST) == 20
    assert Disjointness().T == 16 + 768 + 3
    with pytest.raises(DataError, match="Disjointness.vocab is 40: a set of 19"):
        Disjointness(**SMALL | {"sizes": ((19, 2),)})
    with pytest.raises(DataError, match="a set of 0 tokens"):
        Disjointness(**SMALL | {"tests": ((0, 2),)})
    with pytest.raises(DataError, match="Disjointness.T is 12: the longest row needs 13"):
        Disjointness(**SMALL, T=12)
    with pytest.raises(ValueError, match="Disjointness.reading is 'thrice'"):
        Disjointness(**SMALL, reading="thrice")


@pytest.mark.slow
def test_a_study_is_written_and_goes_on(tmp_path, monkeypatch):
    """One kind is trained for two steps, whole but small; the others' rows are in the ledger already."""
    path, key = tmp_path / "study.jsonl", {"seed": 0, "steps": 2, "loss": 1.0}
    names, sizes = [n for n in read_twice_study.KINDS if n != "ahead"], read_twice_study.LARGE
    known = [
        key | {"name": name, "order": order, "large": n, "accuracy": 0.5}
        for name in names
        for n in sizes
        for order in ("first", "last")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in known))
    monkeypatch.setattr(read_twice_study, "model_of", lambda mixer: LM(W=64, D=16, stages=(Stage((mixer,)),)))
    trained = []
    monkeypatch.setattr(read_twice_study, "SmallRun", lambda *a: trained.append(a) or SmallRun(*a))
    ledger = Ledger(path)
    read_twice_study.study(ledger, 2, 1, Console(quiet=True))
    read_twice_study.study(Ledger(path), 2, 1, Console(quiet=True))
    assert len(trained) == 1 and trained[0][1].config.reading == "ahead"
    rows = ledger.rows[len(known) :]
    assert {row["name"] for row in rows} == {"ahead"} and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert [(row["order"], row["large"]) for row in rows] == [(o, n) for n in sizes for o in ("first", "last")]
    read_twice_study.report(ledger, tmp_path, 2, 1)
    assert (tmp_path / "read_twice.png").stat().st_size > 10_000
    table = (tmp_path / "study.md").read_text()
    assert f"| once | {sizes[0]} | 0.500 | 0.000 | 0.500 | 0.000 | +0.000 |" in table
    assert table.count("| ahead |") == len(sizes)

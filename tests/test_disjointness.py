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
from probes.tasks.disjointness import Disjointness
from training.data import NOT_ASKED, DataError


@pytest.mark.parametrize("reading", ["once", "twice", "ahead"])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3), (9, 1)])
def test_the_label_is_the_one_token_of_both_sets(m, n, reading):
    law = Disjointness(vocab=40, first=m, second=n, reading=reading)
    rows = law.rows(2, np.arange(20))
    for r, (ids, labels) in enumerate(zip(rows.ids_NT.tolist(), rows.labels_NT, strict=True)):
        end, row = len(ids), ids
        if reading == "twice":
            assert ids[: end // 2] == ids[end // 2 :]
            row = ids[: end // 2]
        assert (row[0], row[1 + m], row[-1]) == (1, 2, 3) and len(row) == m + n + 3
        first, second = row[1 : 1 + m], row[2 + m : -1]
        assert len(set(first)) == m and len(set(second)) == n and min(first + second) >= 4
        shared = set(first) & set(second)
        assert len(shared) == 1 and labels[-1] in shared and (labels[:-1] == NOT_ASKED).all()
        # Of its two places in the row as it is read last, the first and the second.
        early, late = (end - len(row) + t for t, token in enumerate(row) if token == labels[-1])
        about = {"depth": early} | ({"distance": end - 1 - late} if n > 1 else {})
        assert {name: values[r, 0] for name, values in rows.about.items()} == about
    batch = law.batch(2, np.arange(20), law.length + 2)
    if reading == "ahead":
        np.testing.assert_array_equal(batch.prefix_BT[5], np.arange(law.length + 2) < law.length - 1)
    else:
        assert batch.prefix_BT is None


def test_every_token_and_place_is_as_likely():
    """5,000 rows: each word in each set, the shared one at each place of either; all within 5 standard errors."""
    rows = Disjointness(vocab=14, first=3, second=4).rows(1, np.arange(5000))
    answer = rows.labels_NT[:, -1]
    places = [(rows.ids_NT[:, part] == answer[:, None]).argmax(1) for part in (slice(1, 4), slice(5, 9))]
    parrot = np.mean(rows.ids_NT[np.arange(5000), 1 + np.arange(5000) % 3] == answer)
    assert abs(parrot - 1 / 3) < 4 * (2 / 9 / 5000) ** 0.5  # the plateau: some token of the smaller set
    for found, options in ((answer - 4, 10), (places[0], 3), (places[1], 4), (rows.ids_NT[:, 1] - 4, 10)):
        count = np.bincount(found, minlength=options)
        assert len(count) == options
        assert (np.abs(count - 5000 / options) < 5 * np.sqrt(5000 / options)).all()
    assert collections.Counter(map(len, map(set, rows.ids_NT.tolist()))) == {9: 5000}
    twice = Disjointness(vocab=14, first=3, second=4, reading="twice").rows(1, np.arange(5000))
    np.testing.assert_array_equal(twice.ids_NT[:, :10], rows.ids_NT)  # another reading, the same sets


def test_what_cannot_be():
    assert len(disjointness.PAPER_TRAIN) == 12 and len(disjointness.PAPER_TEST) == 20
    assert max(part.task.length for part in disjointness.trials["disjointness@paper"].data.test) == 16 + 768 + 3
    with pytest.raises(DataError, match="Disjointness.vocab is 40: a set of 19"):
        Disjointness(vocab=40, first=19)
    with pytest.raises(DataError, match="Disjointness.second is 0"):
        Disjointness(second=0)
    with pytest.raises(ValueError, match="Disjointness.reading is 'thrice'"):
        Disjointness(reading="thrice")


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
    assert len(trained) == 1 and {part.task.reading for part in trained[0][1].config.train} == {"ahead"}
    rows = ledger.rows[len(known) :]
    assert {row["name"] for row in rows} == {"ahead"} and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert [(row["order"], row["large"]) for row in rows] == [(o, n) for n in sizes for o in ("first", "last")]
    read_twice_study.report(ledger, tmp_path, 2, 1)
    assert (tmp_path / "read_twice.png").stat().st_size > 10_000
    table = (tmp_path / "study.md").read_text()
    assert f"| once | {sizes[0]} | 0.500 | 0.000 | 0.500 | 0.000 | +0.000 |" in table
    assert table.count("| ahead |") == len(sizes)

"""Retention: the law of its rows, derived again from what the rows say."""

import collections
import random

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks import retention
from probes.tasks.retention import Retention
from training.data import DataError

LAWS = [
    Retention(),
    Retention(recent=3),
    Retention(updates=0),
    Retention(updates=2, recent=2),
    Retention(14, 3, 30, 3, 1),
    Retention(6, 1, 9, 1, 1),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_key_has_the_last_value_it_was_given(law):
    for row in rows_of(law):
        pairs = [(row.ids[t], row.ids[t + 1]) for t in range(0, 2 * (law.facts + law.updates), 2)]
        first, later = pairs[: law.facts], pairs[law.facts :]
        assert len({key for key, _ in first}) == len({value for _, value in first}) == law.facts
        own, others = {key for key, _ in first}, [key for key, _ in later]
        assert not own & set(others) and len(set(others)) == min(law.others, law.updates)
        assert len(set(others[: law.others])) == len(others[: law.others])  # each once before any again
        meaning = {}
        for n, (key, value) in enumerate(pairs):
            assert 1 <= key < law.vocab // 2 <= value < law.vocab
            assert key not in meaning or meaning[key][0] != value  # an update is one
            meaning[key] = value, n
        context, about = 2 * len(pairs), []
        asked = row.ids[context:]
        assert set(own) <= set(asked) and len(set(asked)) == len(asked) == law.facts + law.recent
        assert row.labels == {context + q: meaning[key][0] for q, key in enumerate(asked)}
        for q, key in enumerate(asked):
            n = meaning[key][1]
            since = len(later) if key in own else len(later) - 1 - (n - law.facts)
            fact = {"depth": 2 * n, "distance": context + q - 2 * n}
            about.append(fact | ({"since": since} if law.recent else {}))
        assert row.about == about


def test_what_is_drawn_is_uniform():
    law = Retention(12, 2, 5, 3, recent=1)
    keys, which, values, steps, recent, orders = (collections.Counter() for _ in range(6))
    for row in rows_of(law, 4000):
        keys[row.ids[0], row.ids[8]] += 1
        others = row.ids[4:14:2]
        which[tuple(others.index(key) for key in others[3:])] += 1
        values[row.ids[1], row.ids[5]] += 1
        steps[(row.ids[11] - row.ids[5 + 2 * others.index(others[3])]) % 6] += 1
        recent[others.index(next(key for key in row.ids[14:] if key in others))] += 1
        orders[tuple(row.ids.index(key) for key in row.ids[14:] if key not in others)] += 1
    for counts, cells in ((keys, 20), (which, 9), (values, 36), (steps, 5), (recent, 3), (orders, 2)):
        assert len(counts) == cells
        fits(list(counts.values()))


def test_plateau():
    """Some value of the first facts."""
    law, luck, hits = Retention(), random.Random(0), []
    for row in rows_of(law, 2000):
        hits.append(np.mean([luck.choice(row.ids[1 : 2 * law.facts : 2]) == label for label in row.labels.values()]))
    near(hits, law.plateau)
    assert Retention(recent=1).plateau is None


def test_trials_train_with_recent_keys_and_ask_without():
    data = retention.trials["retention"].data
    assert [(part.task.updates, part.task.recent) for part in data.train] == [(4, 4), (8, 4), (16, 4)]
    assert [part.task.updates for part in data.test] == [0, 4, 8, 16, 32, 64, 128, 256]
    assert not any(part.task.recent for part in data.test)


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Retention(recent=2), "07c943e9212e058b"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"facts": 0}, "Retention.facts is 0: it must be at least 1"),
        ({"recent": 5}, "Retention.recent is 5: at most 4 of the other keys are written"),
        ({"updates": 2, "recent": 3}, "Retention.recent is 3: at most 2 of the other keys are written"),
        ({"vocab": 17}, "Retention.vocab is 17: so many different keys need at least 18"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        Retention(**fields)
    assert "\n" not in str(caught.value)

"""Recall with updates: the law of its rows, derived again from what the rows say."""

import collections
import random

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks.updates import Updates
from training.data import DataError

LAWS = [
    Updates(),
    Updates(filler="zero"),
    Updates(vocab=60, length=48, pairs=8, updates=8),
    Updates(vocab=26, length=20, pairs=4, updates=1),
    Updates(updates=0),
]


def said(law, row):
    """The pairs that a row says, in order, with their places."""
    return [(row.ids[t], row.ids[t + 1], t) for t in range(0, 2 * (law.pairs + law.updates), 2)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_last_value_counts(law):
    for row in rows_of(law):
        facts = said(law, row)
        first, again = facts[: law.pairs], facts[law.pairs :]
        keys = [key for key, _, _ in first]
        assert len(set(keys)) == law.pairs and all(1 <= key < law.vocab // 2 for key in keys)
        values = [value for _, value, _ in facts]
        assert len(set(values)) == len(values) and all(law.vocab // 2 <= value < law.vocab for value in values)
        new = [key for key, _, _ in again]
        assert len(set(new)) == law.updates and set(new) <= set(keys)
        meaning, about = {key: (value, t) for key, value, t in facts}, []
        context = 2 * len(facts)
        for place, label in row.labels.items():
            key = row.ids[place]
            value, t = meaning[key]
            assert place >= context and place % 2 == 0 and label == value
            fact = {"slot": (place - context) // 2, "distance": place - t, "depth": t}
            fact |= {"pair": keys.index(key)} if law.updates else {}
            about.append(fact | ({"older": int(key in new)} if 0 < law.updates < law.pairs else {}))
        assert about == row.about
        assert sorted(row.ids[place] for place in row.labels) == sorted(keys)
        rest = [row.ids[t] for t in range(context, law.length) if t not in row.labels]
        assert not set(rest) & set(keys) if law.filler == "conflict_free" else not any(rest)


def test_which_keys_and_values_is_chance():
    law = Updates(vocab=12, length=16, pairs=3, updates=2, filler="zero")
    updated, keys, values = (collections.Counter() for _ in range(3))
    for row in rows_of(law, 4000):
        facts = said(law, row)
        at = [key for key, _, _ in facts[:3]]
        updated[tuple(at.index(key) for key, _, _ in facts[3:])] += 1
        keys[at[0], at[2]] += 1
        values[facts[0][1], facts[4][1]] += 1
    for counts, cells in ((updated, 6), (keys, 20), (values, 30)):
        assert len(counts) == cells
        fits(list(counts.values()))


def test_slots_follow_the_power_law():
    """The query that is drawn first: of the only pair, slot g with weight (g + 1)^(exponent - 1)."""
    law = Updates(length=16, pairs=1, updates=1, exponent=0.5)
    counts = collections.Counter(row.about[0]["slot"] for row in rows_of(law, 4000))
    weights = np.arange(1, 7) ** -0.5
    fits([counts[g] for g in range(6)], weights / weights.sum())


def test_plateau_and_what_a_memory_that_does_not_overwrite_gets():
    luck, some, old = random.Random(0), [], []
    law = Updates()
    for row in rows_of(law, 2000):
        facts = said(law, row)
        first = {key: value for key, value, _ in reversed(facts)}
        some.append(np.mean([luck.choice(facts)[1] == label for label in row.labels.values()]))
        old.append(np.mean([first[row.ids[place]] == label for place, label in row.labels.items()]))
    near(some, law.plateau)
    assert set(old) == {1 - law.updates / law.pairs}


def test_harder():
    law = Updates(length=80, pairs=4, updates=2)
    assert law.harder() == Updates(length=80, pairs=8, updates=4)
    assert Updates(length=80, pairs=16, updates=8).harder() is None
    assert Updates(vocab=25, length=80, pairs=4, updates=2).harder() is None
    assert Updates(vocab=26, length=80, pairs=4, updates=2).harder() is not None


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Updates(), "06ffddd698eb4952"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filler": "random"}, "Updates.filler is 'random': it must be one of zero, conflict_free"),
        ({"pairs": 0}, "Updates.pairs is 0: it must be at least 1"),
        ({"updates": 9}, "Updates.updates is 9: a key is updated once, so at most pairs, 8"),
        ({"length": 65}, "Updates.length is 65: it must be even"),
        ({"length": 38}, "Updates.length is 38: 8 pairs, 4 updates and the queries need at least 40"),
        ({"vocab": 25}, "Updates.vocab is 25: so many keys and values need at least 26"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Updates(**fields)
    assert "\n" not in str(caught.value)

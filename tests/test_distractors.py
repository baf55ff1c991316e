"""Recall past distractors: the law of its rows, derived again from what the rows say."""

import collections
import random

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks import distractors
from probes.tasks.distractors import Distractors
from training.data import DataError

LAWS = [
    Distractors(),
    Distractors(between="asked"),
    Distractors(34, 4, 4),
    Distractors(26, 3, 4, "asked"),
    Distractors(blocks=1),
    Distractors(40, 1, 5, "asked"),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_first_block_is_asked_for_after_the_last(law):
    n = law.pairs
    for row in rows_of(law):
        facts, questions, t = {}, [], 0  # key: (value, place, block); (place, block, keys that may be asked)
        for block in range(law.blocks):
            for _ in range(n):
                key, value = row.ids[t : t + 2]
                assert 1 <= key < law.vocab // 2 <= value < law.vocab and key not in facts
                facts[key] = value, t, block
                t += 2
            if law.between == "asked":
                questions += [(t + i, block, list(facts)[-n:]) for i in range(n)]
                t += n
        questions += [(t + i, law.blocks - 1, list(facts)[:n]) for i in range(n)]
        assert t + n == len(row.ids) == law.length
        assert len({value for value, _, _ in facts.values()}) == len(facts)
        labels, about = {}, []
        for i, (place, after, keys) in enumerate(questions):
            key = row.ids[place]
            assert key in keys and key not in row.ids[questions[i // n * n][0] : place]
            value, stands, block = facts[key]
            labels[place] = value
            fact = {"depth": stands, "distance": place - stands}
            about.append(fact | ({"since": after - block} if law.between == "asked" and law.blocks > 1 else {}))
        assert row.labels == labels and row.about == about


def test_what_is_drawn_is_uniform():
    law = Distractors(14, 2, 2, "asked")
    keys, values, orders = (collections.Counter() for _ in range(3))
    for row in rows_of(law, 4000):
        keys[row.ids[0], row.ids[6]] += 1
        values[row.ids[3], row.ids[9]] += 1
        orders[tuple(about["depth"] for about in row.about)] += 1
    for counts, cells in ((keys, 30), (values, 42), (orders, 8)):
        assert len(counts) == cells
        fits(list(counts.values()))


@pytest.mark.parametrize("law", LAWS[:4], ids=str)
def test_plateau(law):
    """Some value that was said before the question."""
    luck, hits = random.Random(0), []
    for row in rows_of(law, 2000):
        right = []
        for place, label in row.labels.items():
            said = [token for token in row.ids[:place] if token >= law.vocab // 2]
            right.append(luck.choice(said) == label)
        hits.append(np.mean(right))
    near(hits, law.plateau)


def test_trials_ask_past_more_rows():
    data = distractors.trials["distractors"].data
    assert [part.task.blocks for part in data.train] == [1, 2, 4]
    assert [part.task.blocks for part in data.test] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Distractors(), "983ec6255b3f2b6a"),
        (Distractors(between="asked"), "a2a1f36bdc8c6e58"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"between": "tasks"}, "Distractors.between is 'tasks': it must be one of facts, asked"),
        ({"blocks": 0}, "Distractors.blocks is 0: it must be at least 1"),
        ({"vocab": 33}, "Distractors.vocab is 33: 16 different keys and values need at least 34"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Distractors(**fields)
    assert "\n" not in str(caught.value)

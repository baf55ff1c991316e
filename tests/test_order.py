"""Order recall: the law of its rows, derived again from what the rows say."""

import collections

import numpy as np
import pytest
from said import digest, fits, rows_of

from probes.evaluation import slices
from probes.tasks import order
from probes.tasks.order import Order
from training.data import DataError

LAWS = [Order(), Order(words=500, segment=8, excerpt=40), Order(near=9, far=11), Order(10, 5, words=900), Order(60, 5)]


def read(law, row):
    """The excerpt, and the places at which the two segments stand in it, the one shown first first."""
    ask, S = law.words, law.segment
    text = row.ids[: row.ids.index(ask)]
    question = row.ids[len(text) :]
    assert len(text) == law.excerpt and max(text) < law.words
    assert (question[0], question[1 + S], question[2 + 2 * S :]) == (ask, ask + 1, [ask + 2])
    found = []
    for segment in (question[1 : 1 + S], question[2 + S : 2 + 2 * S]):
        (at,) = (t for t in range(len(text) - S + 1) if text[t : t + S] == segment)  # it stands there once
        found.append(at)
    return text, *found


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_label_says_which_came_first(law):
    low, high = law.near or law.segment, law.far or law.excerpt - law.segment
    for row in rows_of(law):
        text, one, two = read(law, row)
        assert low <= abs(one - two) <= high
        assert row.labels == {len(row.ids) - 1: law.words + 3 + (one > two)}
        assert row.about == [{"distance": len(text) - max(one, two), "depth": min(one, two)}]


def test_distance_place_and_order_are_uniform():
    law = Order(12, 3, words=1000)
    apart, places, first, words = (collections.Counter() for _ in range(4))
    for row in rows_of(law, 6000):
        text, one, two = read(law, row)
        apart[abs(one - two)] += 1
        places[abs(one - two), min(one, two)] += 1
        first[one < two] += 1
        words[text[0] // 100, text[11] // 100] += 1
    assert len(words) == 100
    fits([apart[d] for d in range(3, 10)])
    fits([first[True], first[False]])
    fits(list(words.values()))
    cells = [(d, p) for d in range(3, 10) for p in range(12 - 3 - d + 1)]
    assert set(places) == set(cells)
    fits([places[cell] for cell in cells], [1 / 7 / (10 - d) for d, _ in cells])


def test_trials_ask_by_distance():
    tests = [part.task for part in order.trials["order"].data.test]
    assert [law.excerpt for law in tests[:5]] == [32, 64, 128, 256, 512]
    assert [law.apart for law in tests[5:]] == [(4, 7), (8, 15), (16, 31), (32, 60)]
    names = slices(order.trials["order"].data.test)
    assert names[0] == {"excerpt": 32, "apart": "4 to 28"} and names[5] == {"excerpt": 64, "apart": "4 to 7"}
    rows = tests[5].rows(0, np.arange(100))
    assert (64 - rows.about["distance"] - rows.about["depth"] <= 7).all()


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Order(), "72fd507520de9a06"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment": 0}, "Order.segment is 0: it must be at least 1"),
        ({"excerpt": 7}, "Order.excerpt is 7: two segments need at least 8"),
        ({"near": 3}, "Order.near is 3: it must be at least segment, 4"),
        ({"far": 125}, "Order.far is 125: it must be from 4 to 124"),
        ({"near": 20, "far": 10}, "Order.far is 10: it must be from 20 to 124"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        Order(**fields)
    assert "\n" not in str(caught.value)

"""Recall by compound keys: the law of its rows, derived again from what the rows say."""

import collections
import random

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks.compound import Compound
from training.data import DataError

LAWS = [Compound(), Compound(filler="zero"), Compound(64, 96, 4), Compound(17, 25, 2), Compound(7, 9, 1)]


def said(law, row):
    return [tuple(row.ids[t : t + 3]) for t in range(0, 3 * law.side**2, 3)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_two_tokens_together_are_the_key(law):
    n, third = law.side**2, law.vocab // 3
    for row in rows_of(law):
        facts = said(law, row)
        keys, values = [fact[:2] for fact in facts], [fact[2] for fact in facts]
        firsts, seconds = ({key[part] for key in keys} for part in (0, 1))
        assert len(set(keys)) == n and len(firsts) == len(seconds) == law.side  # so: every combination, once
        assert all(1 <= a < third for a in firsts) and all(third <= b < 2 * third for b in seconds)
        assert len(set(values)) == n and all(2 * third <= v < law.vocab for v in values)
        queries, about = [], []
        for place, label in row.labels.items():
            key = tuple(row.ids[place - 1 : place + 1])
            assert label == values[keys.index(key)]
            assert (place - 1) % 3 == 0 and place > 3 * n
            queries.append(key)
            pair, slot = keys.index(key), (place - 1) // 3 - n
            about.append({"slot": slot, "distance": place - 1 - 3 * pair, "depth": 3 * pair})
        assert sorted(queries) == sorted(keys) and about == row.about
        rest = [row.ids[t] for t in range(3 * n, law.length) if t not in row.labels and t + 1 not in row.labels]
        assert not set(rest) & (firsts | seconds) if law.filler == "conflict_free" else not any(rest)


def test_facts_are_in_any_order_and_slots_follow_their_law():
    law = Compound(12, 24, 2, filler="zero", exponent=1.0)  # slots are uniform, keys all of the thirds' choices
    orders, slots, values = (collections.Counter() for _ in range(3))
    for row in rows_of(law, 4000):
        facts = said(law, row)
        at = [(a == facts[0][0], b == facts[0][1]) for a, b, _ in facts]
        orders[tuple(at[1:])] += 1
        values[facts[0][2], facts[3][2]] += 1
    for row in rows_of(Compound(12, 24, 1, exponent=0.3), 4000):
        slots[row.about[0]["slot"]] += 1
    for counts, cells in ((orders, 6), (values, 12)):
        assert len(counts) == cells
        fits(list(counts.values()))
    weights = np.arange(1, 8) ** -0.7
    fits([slots[g] for g in range(7)], weights / weights.sum())


def test_parts_are_uniform():
    law = Compound(15, 24, 2)
    first, second = collections.Counter(), collections.Counter()
    for row in rows_of(law, 4000):
        (a, b, _), (c, d, _) = said(law, row)[:2]
        if a != c:
            first[a, c] += 1
        if b != d:
            second[b, d] += 1
    for counts, cells in ((first, 4 * 3), (second, 5 * 4)):
        assert len(counts) == cells
        fits(list(counts.values()))


def test_plateau_and_what_one_part_gives():
    luck, some, half = random.Random(0), [], []
    law = Compound()
    for row in rows_of(law, 2000):
        facts = said(law, row)
        some.append(np.mean([luck.choice(facts)[2] == label for label in row.labels.values()]))
        by_part = [luck.choice([f for f in facts if f[1] == row.ids[place]])[2] for place in row.labels]
        half.append(np.mean([a == b for a, b in zip(by_part, row.labels.values(), strict=True)]))
    near(some, law.plateau)
    near(half, 1 / law.side)


def test_harder():
    assert Compound().harder() == Compound(side=4) and Compound(side=4).harder() is None
    assert Compound(26, 60, 2).harder() is None and Compound(27, 60, 2).harder() == Compound(27, 60, 3)


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Compound(), "dc16a56d87ab90ab"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filler": "random"}, "Compound.filler is 'random': it must be one of zero, conflict_free"),
        ({"side": 0}, "Compound.side is 0: it must be at least 1"),
        ({"length": 53}, "Compound.length is 53: 9 facts of three tokens and their queries need at least 54"),
        ({"vocab": 26}, "Compound.vocab is 26: a third each for such keys and values needs 27"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Compound(**fields)
    assert "\n" not in str(caught.value)

"""Needles: the law of their rows, derived again from what the rows say."""

import collections

import numpy as np
import pytest
from said import completed, digest, fits, near, rows_of

from probes.tasks import draws, needles
from probes.tasks.needles import Needles
from training.data import DataError

BASE = {"length": 150, "words": 40, "names": 12, "period": 7}
LAWS = [
    Needles(**BASE, filler="repeat"),
    Needles(**BASE, symbols=8),
    Needles(**BASE, keys=4),
    Needles(**BASE, filler="needles"),
    Needles(**BASE, filler="needles", keys=2, values=3, queries=2),
    Needles(**BASE, values=4),
    Needles(**BASE, keys=4, queries=4),
    Needles(**BASE, filler="repeat", keys=3, values=2, queries=2, depths=6),
    Needles(length=100, filler="repeat", names=1, digits=10, symbols=5),
    Needles(**BASE | {"length": 62}, symbols=2, keys=2, values=2, queries=2),
]


def read(law, row):
    """The facts of a row as (place, key, digits), its other tokens before the questions, and where those begin."""
    mark, asks = law.vocab - 3, row.ids.index(law.vocab - 1)
    facts, hay, t = [], [], 0
    while t < asks:
        if row.ids[t] == mark:
            key, verb = row.ids[t + 1 : t + 3]
            digits = row.ids[t + 3 : t + 3 + law.symbols]
            assert law.words <= key < law.words + law.names and verb == mark + 1
            assert all(law.words + law.names <= digit < mark for digit in digits)
            facts.append((t, key, digits))
            t += 3 + law.symbols
        else:
            assert row.ids[t] < law.words
            hay.append(row.ids[t])
            t += 1
    return facts, hay, asks


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_label_is_what_the_needles_say(law):
    for row in rows_of(law):
        assert len(row.ids) == law.length
        facts, hay, t = read(law, row)
        assert len(facts) == law.facts
        full, labels, about, keys = [*row.ids, None], {}, [], []
        for q in range(law.queries):
            assert full[t] == law.vocab - 1
            keys.append(full[t + 1])
            mine = [(n, place, digits) for n, (place, key, digits) in enumerate(facts) if key == keys[-1]]
            assert len(mine) == law.values
            for v, (n, place, digits) in enumerate(mine):
                for s, digit in enumerate(digits):
                    at = t + 1 + v * law.symbols + s
                    labels[at] = digit
                    assert full[at + 1] in (digit, None)  # said before the next one is asked for
                    fact = {"answer": q * law.values + v, "depth": place}
                    fact |= {"distance": t - place} if law.queries > 1 else {}
                    about.append(fact | ({"pair": n} if len(facts) > 1 and law.filler != "needles" else {}))
            t += 2 + law.values * law.symbols
        assert t == law.length + 1 and len(set(keys)) == law.queries
        assert labels == row.labels and about == row.about and len(labels) == law.asked
        if law.filler == "repeat":
            assert hay == [i % law.period for i in range(len(hay))]
        if law.filler == "needles":
            assert hay == list(range(len(hay))) and len(hay) < law.needle


def test_needles_stand_at_depths():
    """One of 40 equally spaced places, no two the same, all equally likely."""
    law = Needles(length=150, keys=2, words=40, names=12)
    spaced = [depth * law.room // 39 for depth in range(40)]
    assert law.room == 150 - 4 - 12 and spaced[0] == 0 and spaced[-1] == law.room
    counts = collections.Counter()
    for row in rows_of(law, 3000):
        facts, _, _ = read(law, row)
        before = [place - 6 * n for n, (place, _, _) in enumerate(facts)]
        assert before[0] < before[1]
        counts.update(before)
    fits([counts[place] for place in spaced])
    assert set(counts) == set(spaced)


def test_what_is_drawn_is_uniform():
    law = Needles(length=60, keys=3, values=2, words=4, branches=2, period=4, names=6, digits=4, symbols=1)
    asked, owners, digits, which = (collections.Counter() for _ in range(4))
    for row in rows_of(law, 4000):
        facts, _, t = read(law, row)
        keys = [key for _, key, _ in facts]
        asked[row.ids[t + 1]] += 1
        owners[tuple(key == keys[0] for key in keys[1:])] += 1  # which other needle is of the first one's key
        digits[facts[0][2][0], facts[1][2][0]] += 1
        which[row.about[0]["pair"], row.about[1]["pair"]] += 1
    for counts, cells in ((asked, 6), (owners, 5), (digits, 16), (which, 15)):
        assert len(counts) == cells
        fits(list(counts.values()))


def test_the_text_is_one_chain_for_all_rows():
    """Two words leave `branches` for the next, equally likely; the chain is the law's, not the rows'."""
    law = Needles(length=150, words=12, names=4, branches=3, period=4)
    after = collections.defaultdict(collections.Counter)
    for seed in (1, 2):
        for row in rows_of(law, 600, seed):
            _, text, _ = read(law, row)
            for a, b, c in zip(text, text[1:], text[2:], strict=False):  # a needle interrupts, and the text goes on
                after[a, b][c] += 1
    assert max(map(len, after.values())) == 3
    for follow in after.values():
        if sum(follow.values()) > 100:
            fits(list(follow.values()))
    other = draws.markov(1, 0, np.arange(200), 100, 12, 3, chain=1)
    more = {tuple(row[i : i + 3]) for row in other.tolist() for i in range(98)}
    assert len(more - {(a, b, c) for (a, b), follow in after.items() for c in follow}) > 100


@pytest.mark.parametrize("law", [law for law in LAWS if law.plateau], ids=str)
def test_plateau(law):
    """Completion without the key: as most facts go on that agree with the answer so far."""
    hits, first = [], []
    for row in rows_of(law, 2000):
        facts, answers = [digits for _, _, digits in read(law, row)[0]], list(row.labels.values())
        right = [completed(facts, answers[n : n + law.symbols]) for n in range(0, law.asked, law.symbols)]
        hits.append(np.mean(right))
        first.append(np.mean([answer[0] for answer in right]))
    near(hits, law.plateau)
    assert np.mean(first) < 0.5 < law.plateau  # the rest is no recall
    assert Needles().plateau is None


def test_other_lengths_are_the_same_task():
    """A trial's laws differ in length alone, and are asked rows up to 16 times as long as those of training."""
    for name in needles._FAMILY:
        data = needles.trials[name].data
        laws = [part.task for part in data.train + data.test]
        assert len({str(law).replace(f"length={law.length}", "") for law in laws}) == 1
        assert [law.length for law in laws] == [64, 64, 128, 256, 512, 1024]
        assert max(part.task.length for part in needles.trials[f"{name}@large"].data.test) == 16384


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Needles(), "28cb635ddd4a87c9"),
        (Needles(filler="repeat", keys=3, values=2, queries=2), "511ba389808628bd"),
        (Needles(length=100, filler="needles"), "407169c699f4cc2b"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filler": "essay"}, "Needles.filler is 'essay': it must be one of repeat, markov, needles"),
        ({"values": 0}, "Needles.values is 0: it must be at least 1"),
        ({"queries": 2}, "Needles.queries is 2: it must be at most keys, 1"),
        ({"keys": 5, "names": 4}, "Needles.keys is 5: it must be at most names"),
        ({"keys": 4, "names": 4, "filler": "needles"}, "Needles.keys is 4: it must be at most names - 1"),
        ({"keys": 3, "values": 3, "depths": 8}, "Needles.depths is 8: 9 needles need as many"),
        ({"words": 20}, "Needles.words is 20: it must be at least period and branches"),
        ({"length": 10}, "Needles.length is 10: its needles and questions need at least 11"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Needles(**fields)
    assert "\n" not in str(caught.value)
    Needles(length=11)

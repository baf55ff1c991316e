"""In-context languages: automata of the pool against brute force, and rows read by the automata."""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest
from said import digest, fits, rows_of

from probes.evaluation import evaluate
from probes.tasks.automata import Automata, candidates, smallest, trials
from probes.tasks.task import Part
from training.data import DataError

LAW = Automata(length=120, letters=7, nodes=6, fewest=3, most=6, longest=20, automata=40, held_out=30)


def read(form, ids, mark):
    """The letters that may follow after each token, or None if a word is not of the language."""
    state, legal = 0, []
    for word in ids:
        if word == mark:
            state = 0
        else:
            after = dict(form[state])
            if word not in after:
                return None
            state = after[word]
        legal.append(sum(1 << letter for letter, _ in form[state]))
    return legal


@pytest.mark.parametrize("law", [LAW, dataclasses.replace(LAW, part="held_out"), Automata(automata=20, held_out=20)])
def test_rows_are_of_one_language(law):
    mark, found = law.letters, []
    for row in rows_of(law, 80):
        asked = {t: after for t, after in enumerate(row.ids[1:]) if after != mark}
        assert row.labels == asked
        fitting = {n: legal for n, form in enumerate(law.languages) if (legal := read(form, row.ids, mark))}
        # Its words may all be of a wider language too, where more may follow.
        exact = [n for n, legal in fitting.items() if row.about == [{"legal": legal[t]} for t in asked]]
        assert len(exact) == 1 and len(fitting) < 4
        found += exact
        assert len(row.ids) <= law.length and row.ids[0] != mark
        words = "".join("|" if word == mark else "a" for word in row.ids).split("|")
        assert max(map(len, words)) <= law.longest and min(map(len, words[:-1])) >= 1
        if len(row.ids) < law.length:
            assert law.fewest <= len(words) <= law.most and words[-1]
    P = len(law.languages)
    for begin in range(0, 80 - P + 1, P):  # every automaton has a row before any has another
        assert sorted(found[begin : begin + P]) == list(range(P))
    assert found[:P] != found[P : 2 * P] and found[:P] != list(range(P))


def language(out, longest, state=0):
    """All words of up to so many letters, from a state."""
    words = {()}
    if longest:
        for letter, after in out[state].items():
            words |= {(letter, *word) for word in language(out, longest - 1, after)}
    return words


def test_the_smallest_automaton():
    """Same language, all states reached and told apart, one form however the states are numbered."""
    draw, shrunk = random.Random(3), 0
    for _ in range(150):
        n = draw.randint(1, 6)
        raw = [{a: draw.randrange(n) for a in draw.sample(range(3), draw.randint(1, 2))} for _ in range(n)]
        form = [dict(state) for state in smallest(raw)]
        assert language(form, n + 2) == language(raw, n + 2)
        states = [language(form, n, s) for s in range(len(form))]
        assert all(one != other for one, other in itertools.combinations(states, 2))
        reached = {0}
        for _ in form:
            reached |= {after for s in reached for after in form[s].values()}
        assert reached == set(range(len(form)))
        shrunk += len(form) < n
        names = [0, *draw.sample(range(1, n), n - 1)]
        renamed = [{a: names[after] for a, after in raw[s].items()} for s in map(names.index, range(n))]
        assert smallest(renamed) == smallest(raw)
    assert shrunk > 30


def test_candidates_are_drawn_as_said():
    nodes, letters, edges = 7, 6, 3
    made = candidates(letters, nodes, edges, 5, np.arange(3000))
    fits(np.bincount([len(raw) for raw in made], minlength=8)[4:])
    degrees, firsts, ways = collections.Counter(), collections.Counter(), collections.Counter()
    owned = collections.Counter()
    for raw in made:
        degrees.update(len(out) for out in raw)
        for s, out in enumerate(raw):
            assert s not in out.values() and len(set(out.values())) == len(out) and max(out.values()) < len(raw)
        if len(raw) == 5:
            ways[tuple(raw[2].values())[:1]] += 1
        firsts[next(iter(raw[0]))] += 1
        owned[len(set(itertools.chain(*raw)))] += 1
    fits([degrees[d] for d in (1, 2, 3)])
    fits([ways[(s,)] for s in (0, 1, 3, 4)])
    fits([firsts[a] for a in range(letters)])
    assert max(owned) == letters


def test_parts_share_no_language():
    train, held_out = LAW.languages, dataclasses.replace(LAW, part="held_out").languages
    assert (len(train), len(held_out)) == (40, 30) and len({*train, *held_out}) == 70
    assert dataclasses.replace(LAW, automata=25).languages == train[:25]
    assert not set(train) >= set(dataclasses.replace(LAW, pool=1).languages)
    assert all(smallest([dict(state) for state in form]) == form for form in train)
    paper = trials["languages@paper"].data
    assert [len(part.task.languages) for part in (*paper.train, *paper.test)] == [5000, 5000, 250]
    assert not set(paper.train[0].task.languages) & set(paper.test[1].task.languages)
    assert (paper.train[0].rows, paper.B, trials["languages@paper"].steps) == (5000, 32, 200 * -(-5000 // 32))
    assert paper.train[0].task.length == 19 * 50 - 1  # no row is cut


def test_rows_are_uniform():
    law = dataclasses.replace(LAW, length=200, longest=9)  # nothing is cut
    words, sizes, choices = collections.Counter(), collections.Counter(), {2: [0, 0], 3: [0, 0, 0]}
    for row in rows_of(law, 1500):
        said = [list(group) for mark, group in itertools.groupby(row.ids, lambda w: w == law.letters) if not mark]
        words[len(said)] += 1
        sizes.update(map(len, said))
        for facts, label in zip(row.about, row.labels.values(), strict=True):
            legal = [letter for letter in range(law.letters) if facts["legal"] >> letter & 1]
            if len(legal) > 1:
                choices[len(legal)][legal.index(label)] += 1
    fits([words[n] for n in range(3, 7)])
    fits([sizes[n] for n in range(1, 10)])
    fits(choices[2])
    fits(choices[3])


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Automata(), "bd9810f40599b11f"),
        (Automata(part="held_out", pool=3, automata=50), "5bdab945ba399cb5"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


def test_plateau():
    """A letter of the row, drawn, at every question."""
    law, right = Automata(length=128, automata=64, held_out=64), []
    for row in rows_of(law, 640):
        said = np.bincount([word for word in row.ids if word < law.letters], minlength=law.letters)
        legal = np.array([facts["legal"] for facts in row.about])
        right.append(np.mean((legal[:, None] >> np.arange(law.letters) & 1) @ (said / said.sum())))
    assert abs(np.mean(right) - law.plateau) < 0.015


def test_right_is_what_may_follow():
    """A model that always says one letter is right wherever it may stand."""
    rows = LAW.rows(LAW.test_seed(), np.arange(50))
    may = [np.mean([facts >> 2 & 1 for facts in legal if facts >= 0]) for legal in rows.about["legal"]]

    def says(letter):
        return lambda batch, _: (np.full_like(batch.ids_BT, letter), np.zeros(batch.ids_BT.shape))

    (score,) = evaluate(says(2), [Part(LAW, 50)])
    assert np.isclose(score.accuracy, np.mean(may)) and 0.1 < score.accuracy < 0.9
    (score,) = evaluate(says(LAW.letters), [Part(LAW, 50)])
    assert score.accuracy == 0


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"letters": 3}, "Automata.letters is 3: it must be above edges, 3, and at most 61"),
        ({"letters": 62}, "Automata.letters is 62"),
        ({"nodes": 3}, "Automata.nodes is 3: it must be above edges, 3"),
        ({"fewest": 1}, "Automata.fewest is 1: it must be at least 2"),
        ({"most": 9}, "Automata.most is 9: it must be at least 10"),
        ({"part": "test"}, "Automata.part is 'test': it must be one of train, held_out"),
    ],
)
def test_what_cannot_be(law, message):
    with pytest.raises((DataError, ValueError), match=message):
        Automata(**law)


def test_a_pool_that_cannot_be():
    with pytest.raises(DataError, match="Automata.automata is 100 with those held out: of 2 nodes and 2 letters"):
        _ = Automata(letters=2, nodes=2, edges=1, automata=60, held_out=40).languages

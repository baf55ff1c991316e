"""The small world: the law of its rows, derived again from what the rows say."""

import collections

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks import world
from probes.tasks.world import World
from training.data import DataError

LAWS = [
    World(),
    World(takes=2),
    World("qa2", facts=8, takes=3),
    World("qa2", 60, 12, 6, words=9, persons=2, rooms=3, objects=1),
    World("qa2", 8, 2, 1, persons=1, rooms=2),
    World("qa1", 20, 6, persons=1, rooms=2),
]


def read(law, row):
    """The facts of a row as (place, person, verb, what), with words for tokens, its text, and what is asked for."""
    names = [f"w{i}" for i in range(law.words)] + [f"p{i}" for i in range(law.persons)]
    names += [f"r{i}" for i in range(law.rooms)] + [f"o{i}" for i in range(law.objects)] + ["AT", "TAKES", "WHERE"]
    said = [names[token] for token in row.ids]
    assert len(said) == law.length and law.vocab == len(names)
    facts, text, t = [], [], 0
    while said[t] != "WHERE":
        if said[t][0] == "w":
            text.append(said[t])
            t += 1
        else:
            who, verb, what = said[t : t + 3]
            assert who[0] == "p" and (verb, what[0]) in (("AT", "r"), ("TAKES", "o"))
            facts.append((t, who, verb, what))
            t += 3
    assert t == law.length - 2
    ((place, label),) = row.labels.items()
    assert place == law.length - 1
    return facts, text, said[-1], names[label]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_label_is_where_it_is(law):
    for row in rows_of(law):
        facts, _, asked, label = read(law, row)
        assert len(facts) == law.facts and sum(verb == "TAKES" for _, _, verb, _ in facts) == law.takes
        room, holder = {}, {}  # of a person: the room and the fact that says it; of an object: its holder, and so on
        for n, (_, who, verb, what) in enumerate(facts):
            if verb == "AT":
                assert who not in room or room[who][0] != what
                room[who] = what, n
            else:
                assert who in room
                holder[what] = who, n
        support = []
        if law.kind == "qa2":
            asked, n = holder[asked]
            support.append(n)
        answer, n = room[asked]
        support.append(n)
        assert label == answer
        first, last = (facts[m][0] for m in (min(support), max(support)))
        fact = {"pair": n, "depth": first}
        assert row.about == [fact | ({"distance": law.length - 2 - last} if law.kind == "qa2" else {})]


def test_facts_are_drawn_as_the_law_says():
    law = World("qa2", 20, 4, 2, words=4, persons=3, rooms=4, objects=2)
    order, moves, takers, things, asked, gaps, again = (collections.Counter() for _ in range(7))
    for row in rows_of(law, 6000):
        facts, _, what, _ = read(law, row)
        at = [n for n, fact in enumerate(facts) if fact[2] == "AT"]
        order[tuple(at)] += 1
        moves[tuple(facts[at[0]][1::2]), facts[at[1]][1]] += 1
        if at == [0, 1] and facts[0][1] != facts[1][1]:
            takers[tuple([facts[0][1], facts[1][1]].index(facts[n][1]) for n in (2, 3))] += 1
        if facts[at[0]][1] == facts[at[1]][1]:
            again[(int(facts[at[1]][3][1]) - int(facts[at[0]][3][1])) % 4] += 1
        taken = [fact[3] for fact in facts if fact[2] == "TAKES"]
        things[tuple(taken)] += 1
        if taken[0] != taken[1]:
            asked[taken.index(what)] += 1
        gaps[tuple(fact[0] - 3 * n for n, fact in enumerate(facts))] += 1
    for counts, cells in ((order, 3), (moves, 36), (takers, 4), (again, 3), (things, 4), (asked, 2)):
        assert len(counts) == cells
        fits(list(counts.values()))
    # Four independent places among the 7 gaps, in order: each order of different ones is as likely.
    ways = {key: 24 / np.prod([float(np.prod(range(1, key.count(g) + 1))) for g in set(key)]) for key in gaps}
    assert len(ways) == 210 and sum(ways.values()) == 7**4
    some = [key for key in ways if ways[key] == 24]
    fits([gaps[key] for key in some])
    assert abs(sum(gaps[key] for key in some) / 6000 - 24 * len(some) / 7**4) < 0.03


def test_the_person_asked_for_is_the_one_of_any_fact():
    law = World("qa1", 20, 3, persons=2)
    asked = collections.Counter()
    for row in rows_of(law, 3000):
        facts, _, who, _ = read(law, row)
        persons = [fact[1] for fact in facts]
        if len(set(persons)) == 2:
            asked[persons.count(who)] += 1
    fits([asked[1], asked[2]], [1 / 3, 2 / 3])


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_plateau(law):
    """The last room said, whoever is there."""
    hits = []
    for row in rows_of(law, 2000):
        facts, _, _, label = read(law, row)
        hits.append([what for _, _, verb, what in facts if verb == "AT"][-1] == label)
    near(hits, law.plateau)


def test_the_text_is_one_chain_for_all_rows():
    law = World(length=120, words=10, branches=2)
    after = collections.defaultdict(set)
    for seed in (1, 2):
        for row in rows_of(law, 300, seed):
            _, text, _, _ = read(law, row)
            for a, b, c in zip(text, text[1:], text[2:], strict=False):
                after[a, b].add(c)
    assert set(map(len, after.values())) == {2}


def test_trials_ask_longer_rows():
    for name, kind in (("world", "qa1"), ("world_two", "qa2")):
        data = world.trials[name].data
        assert {part.task.kind for part in data.train + data.test} == {kind}
        assert [part.task.length for part in data.test] == [32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (World(), "76b4bcec503cee4d"),
        (World("qa2", takes=2), "b9c42ccaee28ebc8"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "qa3"}, "World.kind is 'qa3': it must be one of qa1, qa2"),
        ({"kind": "qa2"}, "World.takes is 0: it must be at least 1"),
        ({"takes": 6}, "World.takes is 6: it must be below facts, 6"),
        ({"rooms": 1}, "World.rooms is 1: it must be at least 2"),
        ({"words": 3}, "World.branches is 4: it must be at most words, 3"),
        ({"length": 19}, "World.length is 19: 6 facts and the question need at least 20"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        World(**fields)
    assert "\n" not in str(caught.value)

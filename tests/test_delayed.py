"""Delayed recall: the laws of its rows, derived again from what the rows say."""

import collections
import random

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.evaluation import slices
from probes.tasks import delayed
from probes.tasks.delayed import Delayed
from training.data import DataError

LAWS = [
    Delayed(),
    Delayed(noise=5),
    Delayed(delay=1, symbols=2),
    Delayed("copy", 20, 10),
    Delayed("copy", 3, 2, symbols=3, noise=2),
    Delayed("copy", 5, 1),
    Delayed("repeat", 4, 30),
    Delayed("repeat", 1, 1),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_label_is_what_was_said_before_the_delay(law):
    go = 1 + law.symbols
    for row in rows_of(law):
        if law.kind == "repeat":
            assert len(row.ids) == law.delay + law.items and all(1 <= token < go for token in row.ids)
            asked = {t: row.ids[t - law.delay] for t in range(law.delay, len(row.ids))}
        else:
            start = row.ids.index(go)
            cue, between, after = row.ids[: law.items], row.ids[law.items : start], row.ids[start + 1 :]
            assert len(between) == law.delay and after == [0] * (law.items - 1)
            assert all(1 <= token < go for token in cue)
            assert all(go < token < law.vocab for token in between) if law.noise else not any(between)
            asked = dict(enumerate(cue, start))
        assert row.labels == asked
        facts = [{"depth": i} if law.items > 1 else {} for i in range(len(asked))]
        assert row.about == [fact | ({"answer": 0} if law.kind == "copy" else {}) for fact in facts]


@pytest.mark.parametrize("law", [LAWS[1], LAWS[4], Delayed("repeat", 2, 3, symbols=3)], ids=str)
def test_symbols_and_noise_are_uniform(law):
    ends, noise = collections.Counter(), collections.Counter()
    for row in rows_of(law, 3000):
        ends[row.ids[0], list(row.labels.values())[-1] if law.items > 1 else 0] += 1
        noise[row.ids[law.items]] += 1
    assert len(ends) == law.symbols ** min(2, law.items) and len(noise) == (law.noise or law.symbols)
    fits(list(ends.values()))
    fits(list(noise.values()))


def test_plateau():
    """Some symbol of the cue."""
    luck = random.Random(0)
    law = Delayed("copy", 5, 4, symbols=6)
    hits = [np.mean([luck.choice(row.ids[:4]) == a for a in row.labels.values()]) for row in rows_of(law, 2000)]
    near(hits, law.plateau)
    assert Delayed().plateau is None and Delayed("repeat", 4, 30).plateau is None


def test_trials_ask_over_delays():
    for name in ("delayed", "copy_memory"):
        data = delayed.trials[name].data
        assert [part.task.delay for part in data.train] == [16, 32, 64]
        assert [part.task.delay for part in data.test] == [16 << i for i in range(7)]
        assert delayed.trials[f"{name}@large"].data.test[-1].task.delay == 16384


def test_no_convolutions_reach_back_to_what_is_repeated():
    """None stands in front, and those of four taps in the layers together fall short of the delay."""
    found = {name: trial for name, trial in delayed.trials.items() if name.startswith("repeat_previous")}
    assert len(found) == 3
    for trial in found.values():
        delays = {part.task.delay for part in trial.data.train + trial.data.test}
        assert [list(slice) for slice in slices(trial.data.test)] == [["length"]] * len(trial.data.test)
        assert not trial.conv and len(delays) == 1 and min(delays) > 3 * trial.blocks


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Delayed(noise=5), "272e541b338278e3"),
        (Delayed("copy", 9, 10), "e50e085294af9035"),
        (Delayed("repeat", 4, 9), "ff808ca84cd21026"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "maze"}, "Delayed.kind is 'maze': it must be one of recall, copy, repeat"),
        ({"delay": 0}, "Delayed.delay is 0: it must be at least 1"),
        ({"items": 2}, "Delayed.items is 2: recall has one cue"),
        ({"kind": "repeat", "noise": 1}, "Delayed.noise is 1: repeat has nothing but symbols"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Delayed(**fields)
    assert "\n" not in str(caught.value)

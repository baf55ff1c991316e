"""What every task keeps, whatever its law: found by `discover`, so that a new file is judged without being listed.

Each task's own law is judged in a file of its own, from what its rows say.
"""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import said
import tiny

from probes.tasks import mad, task
from probes.tasks.dances import Dances
from probes.tasks.disjointness import Disjointness
from probes.tasks.facts import Facts
from probes.tasks.overwrite import Overwrite
from probes.tasks.recall import MQAR
from training.data import NOT_ASKED

TRIALS = task.discover()
LAWS = {
    f"{name} {number}": part.task
    for name, trial in TRIALS.items()
    for number, part in enumerate(trial.data.train + trial.data.test)
}
SMALL = {name: law for name, law in LAWS.items() if ("@" not in name or "@smoke" in name) and law.length <= 600}
every_law = pytest.mark.parametrize("law", list(dict.fromkeys(LAWS.values())), ids=lambda law: law.name[:60])
small_laws = pytest.mark.parametrize("law", list(dict.fromkeys(SMALL.values())), ids=lambda law: law.name[:60])


def same(one, two):
    assert (one.ids_NT == two.ids_NT).all() and (one.labels_NT == two.labels_NT).all()
    assert one.about.keys() == two.about.keys()
    for key, values in one.about.items():
        np.testing.assert_array_equal(values, two.about[key])


def picked(rows, index):
    length = None if rows.length_N is None else rows.length_N[index]
    return task.Rows(rows.ids_NT[index], rows.labels_NT[index], {k: v[index] for k, v in rows.about.items()}, length)


@every_law
def test_rows_are_as_they_say(law):
    N = 7 if law.length > 600 else 40
    rows = law.rows(3, np.arange(N))
    assert rows.ids_NT.shape == rows.labels_NT.shape and rows.ids_NT.shape[0] == N
    assert rows.ids_NT.shape[1] <= law.length
    assert rows.ids_NT.dtype == rows.labels_NT.dtype == np.int32
    assert rows.ids_NT.min() >= 0 and rows.ids_NT.max() < law.vocab
    asked = rows.labels_NT != NOT_ASKED
    assert (rows.labels_NT[asked] >= 0).all() and (rows.labels_NT[asked] < law.vocab).all()
    count = asked.sum(1)
    assert (count >= 1).all() and count.max() <= law.asked
    if rows.length_N is not None:
        beyond = np.arange(rows.ids_NT.shape[1]) >= rows.length_N[:, None]
        assert not (asked & beyond).any() and (rows.length_N <= law.length).all()
        assert rows.length_N.dtype == np.int64
    own = np.arange(law.asked) < count[:, None]
    for name, values in rows.about.items():
        assert values.dtype == np.int64 and values.shape == own.shape, name
        assert (values[~own] == -1).all() and (values[own] >= 0).all(), name
    if "distance" in rows.about:
        place = np.nonzero(asked)[1]
        assert (rows.about["distance"][own] <= place).all()
    if "legal" in rows.about:
        assert law.vocab < 63 and (rows.about["legal"][own] >> rows.labels_NT[asked] & 1 == 1).all()
    assert 0 <= law.chance < 1 and (law.plateau is None or 0 < law.plateau <= 1)
    assert law.region < law.length


@small_laws
def test_what_is_said_of_questions_tells_something(law):
    """Nothing is the same for all questions of a law, and nothing follows from another thing and says it again."""
    rows = law.rows(2, np.arange(400))
    own = rows.labels_NT[rows.labels_NT != NOT_ASKED].size
    known = {k: v[v >= 0] for k, v in rows.about.items() if k not in ("answer", "legal")}
    assert all(len(values) == own for values in known.values())
    kinds = {name: len(np.unique(values)) for name, values in known.items()}
    assert min(kinds.values(), default=2) > 1, kinds
    for one, other in itertools.combinations(known, 2):
        both = len(np.unique(np.stack([known[one], known[other]]), axis=1).T)
        assert not both == kinds[one] == kinds[other], (one, other)


@every_law
def test_a_row_is_a_function_of_seed_and_index(law):
    N = 5 if law.length > 600 else 30
    rows = law.rows(7, np.arange(N))
    index = np.array([4, 1, 4, N - 1])
    same(law.rows(7, index), picked(rows, index))
    same(dataclasses.replace(law).rows(7, index[:1]), picked(rows, index[:1]))
    assert (law.rows(8, np.arange(N)).ids_NT != rows.ids_NT).any(1).mean() > 0.5
    far = law.rows(7, np.arange(10**12, 10**12 + N))
    assert (far.ids_NT != rows.ids_NT).any(1).mean() > 0.5


@small_laws
def test_chance_is_what_another_rows_answer_gives(law):
    """Answers of one row given to another: as often right as the law says, within four standard errors."""
    N = 2000
    rows, other = (law.rows(seed, np.arange(N)) for seed in (11, 12))
    asked, others = rows.labels_NT != NOT_ASKED, other.labels_NT != NOT_ASKED
    hits = []
    for n in range(N):
        answers, guesses = rows.labels_NT[n][asked[n]], other.labels_NT[n][others[n]]
        Q = min(len(answers), len(guesses))
        if "legal" in rows.about:
            hits.append(np.mean(rows.about["legal"][n, :Q] >> guesses[:Q] & 1))
        else:
            hits.append(np.mean(answers[:Q] == guesses[:Q]))
    error = max(float(np.std(hits)), (law.chance * (1 - law.chance)) ** 0.5) / N**0.5 + 1 / N
    assert abs(np.mean(hits) - law.chance) < 4 * error, (np.mean(hits), law.chance, error)


def test_every_trial_is_well_made():
    for name, trial in TRIALS.items():
        assert name == name.lower() and " " not in name
        assert name.partition("@")[0] in TRIALS, f"{name} has no size of its own name"
        data = trial.data.build()
        batch = data.batch(0, 1, slice(0, 2))
        assert batch.ids_BT.shape == (2, trial.data.T) and (batch.labels_BT != NOT_ASKED).any()


def test_the_steps_to_a_goal_are_counted_on_a_law_trained_on():
    """Up to which of a row's places are asked, as training may ask for more, and to languages being held out."""
    for name, trial in (TRIALS | mad.sweep()).items():
        law = trial.goal_law
        asks = {field: getattr(law, field) for field in ("targets", "recent", "part") if hasattr(law, field)}
        assert law in {dataclasses.replace(part.task, **asks) for part in trial.data.train}, name
        assert asks.get("targets") != "all" and not asks.get("recent"), name
        assert getattr(law, "updates", 1) > 0, name


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Dances(delay=3), "9f208f9566529fba"),
        (Facts(), "1592a1115df7fb95"),
        (Overwrite(), "0531884894b4350b"),
        (Disjointness(), "0f6ec75ec22a9256"),
        (Disjointness(first=9, reading="twice"), "7d65c60b115cb94f"),
        (MQAR(passes=3, again="shuffled"), "fc689046574b8b29"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy: results of different days can be compared."""
    assert said.digest(law) == golden


def test_rows_need_no_jax():
    """Another framework may train on them (benchmarks/recall_peers.py), in an environment of its own."""
    code = "import sys; from probes.tasks import task; task.discover(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, timeout=60).returncode == 0

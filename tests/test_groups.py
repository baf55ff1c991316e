"""Word problems of groups: products by hand, the groups' own laws, and what is trained and asked."""

import itertools

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks.groups import Groups, table, trials
from training.data import DataError


def permutations(n, even):
    """All permutations of n things in the order of dictionaries, or the even ones, by counting cycles."""

    def cycles(p):
        seen, count = set(), 0
        for start in range(n):
            count += start not in seen
            while start not in seen:
                seen.add(start)
                start = p[start]
        return count

    return [p for p in itertools.permutations(range(n)) if not even or (n - cycles(p)) % 2 == 0]


def compose(a, b):
    return tuple(a[b[i]] for i in range(len(a)))


def by_hand(name):
    """A group's elements by token, and a · b."""
    if name == "A4xZ5":
        elements = [(p, z) for p in permutations(4, True) for z in range(5)]
        return elements, lambda a, b: (compose(a[0], b[0]), (a[1] + b[1]) % 5)
    n = int(name[1:])
    if name[0] == "Z":
        return list(range(n)), lambda a, b: (a + b) % n
    return permutations(n, name[0] == "A"), compose


NAMES = ["Z2", "Z5", "Z60", "S3", "A4", "S5", "A5", "A4xZ5"]
ORDERS = [*zip(NAMES, (2, 5, 60, 6, 12, 120, 60, 60), strict=True), ("Z3xZ2xS3", 36)]


@pytest.mark.parametrize("labels", ["every", "last"])
@pytest.mark.parametrize("shortest", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_running_products(name, shortest, labels):
    elements, times = by_hand(name)
    law = Groups(name, 12, labels, shortest)
    assert law.vocab == len(elements)
    for row in rows_of(law, 40):
        assert (shortest or 12) <= len(row.ids) <= 12
        so_far, products = elements[0], []
        for word in row.ids:
            so_far = times(so_far, elements[word])
            products.append(elements.index(so_far))
        asked = dict(enumerate(products))
        if labels == "last":
            asked = {len(products) - 1: products[-1]}
        assert row.labels == asked and row.about == [
            {"slot": t} if shortest or labels == "every" else {} for t in asked
        ]


@pytest.mark.parametrize(
    ("name", "order"), [*zip(NAMES, (2, 5, 60, 6, 12, 120, 60, 60), strict=True), ("Z3xZ2xS3", 36)]
)
def test_a_table_is_of_a_group(name, order):
    times = table(name)
    every = np.arange(order)
    assert times.shape == (order, order)
    assert (times[0] == every).all() and (times[:, 0] == every).all()
    assert (np.sort(times, 0) == every[:, None]).all() and (np.sort(times, 1) == every).all()
    assert (times[times] == times[every[:, None, None], times[None]]).all()  # (a·b)·c = a·(b·c)


def derived(times, members):
    """What the commutators a⁻¹ b⁻¹ a b of some members make."""
    inverse = times.argmin(1)
    made = {int(times[times[inverse[a], inverse[b]], times[a, b]]) for a in members for b in members}
    while True:
        more = {int(times[a, b]) for a in made for b in made}
        if more <= made:
            return made
        made |= more


def test_what_makes_a5_hard():
    """Of the three groups of 60, commutators lead down to one element in all but A5."""
    sizes = {}
    for name in ("Z60", "A4xZ5", "A5"):
        members, sizes[name] = set(range(60)), []
        while len(sizes[name]) < 3:
            members = derived(table(name), members)
            sizes[name].append(len(members))
    assert sizes == {"Z60": [1, 1, 1], "A4xZ5": [4, 1, 1], "A5": [60, 60, 60]}


def test_rows_are_uniform():
    rows = Groups("S3", 9, "last", 4).rows(1, np.arange(12_000))
    fits(np.bincount(rows.length_N, minlength=10)[4:])
    fits(np.bincount(rows.ids_NT[:, 0] * 6 + rows.ids_NT[:, 1]))
    fits(np.bincount(rows.labels_NT.max(1)))
    every = Groups("S3", 9).rows(1, np.arange(12_000)).labels_NT
    fits(np.bincount(every[:, 7] * 6 + every[:, 8]))  # one product says nothing of the next


@pytest.mark.parametrize("law", [Groups("S3", 5), Groups("Z2", 9, shortest=2)], ids=str)
def test_plateau(law):
    """The token itself."""
    near([np.mean([row.ids[t] == a for t, a in row.labels.items()]) for row in rows_of(law, 3000)], law.plateau)
    assert Groups(labels="last").plateau is None


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Groups("A5"), "635cd1d02e31684d"),
        (Groups("A4xZ5", 12, "last", 3), "ec0c74aa8d92ec5a"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


def test_trials():
    lengths = {name: [part.task.length for part in trials[name].data.test] for name in ("parity", "mod5", "s3", "a5")}
    assert lengths == {name: [40, 80, 160, 320] for name in ("parity", "mod5", "s3")} | {"a5": [20, 40, 80, 160]}
    assert not any(trial.conv for trial in trials.values())
    (train,), (one, far) = trials["parity@paper"].data.train, trials["parity@paper"].data.test
    assert (train.task.shortest, train.task.length, train.rows, one.task) == (3, 40, 0, train.task)
    assert (far.task.shortest, far.task.length, far.rows, far.task.labels) == (40, 256, 8192, "last")
    assert {trials[f"{name}@paper"].data.train[0].task.vocab for name in ("z60", "a4xz5", "a5")} == {60}


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"group": "S2"}, "Groups.group is 'S2': it must be Zk, S3 to S6"),
        ({"group": "A5x"}, "Groups.group is 'A5x'"),
        ({"group": "Z1"}, "Groups.group is 'Z1'"),
        ({"length": 4, "shortest": 5}, "Groups.shortest is 5: it must be at most length, 4"),
        ({"length": 0}, "Groups.length is 0: it must be at least 1"),
        ({"labels": "some"}, "Groups.labels is 'some': it must be one of every, last"),
    ],
)
def test_what_cannot_be(law, message):
    with pytest.raises((DataError, ValueError), match=message):
        Groups(**law)

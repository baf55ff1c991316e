"""Draws that tasks share, judged by counting: uniform where they say so, and functions of seed and index alone."""

import collections

import numpy as np
from said import fits

from probes.tasks import draws


def test_orders():
    rows = draws.orders(3, 1, np.arange(6000), 4)
    assert (np.sort(rows, 1) == np.arange(4)).all()
    counts = collections.Counter(map(tuple, rows.tolist()))
    assert len(counts) == 24
    fits(list(counts.values()))
    wide = draws.orders(3, 1, np.arange(5), 70_000)  # more than fits 16 bits
    assert (np.sort(wide, 1) == np.arange(70_000)).all()
    assert (draws.orders(3, 1, np.array([4, 2]), 70_000) == wide[[4, 2]]).all()


def test_integers_below_each():
    below = np.array([[2, 3], [1, 5]] * 3000)
    rows = draws.integers(1, 0, np.arange(6000), 2, below)
    for column, one, two in ((0, 2, 1), (1, 3, 5)):
        fits(np.bincount(rows[::2, column], minlength=one))
        assert rows[1::2, column].max() == two - 1
    assert (draws.integers(1, 0, np.arange(5), 2, 7) == draws.integers(1, 0, np.arange(5), 2, np.array([7, 7]))).all()


def test_others_are_what_is_left():
    excluded = draws.distinct(0, 0, np.arange(200), 4, 12)
    left = draws.others(excluded, np.broadcast_to(np.arange(8), (200, 8)))
    for row, out in zip(excluded.tolist(), left.tolist(), strict=True):
        assert out == sorted(set(range(12)) - set(row))
    alone = draws.others(excluded[7:8], np.array([[3, 0, 3]]))  # whatever rows stand beside it
    assert (alone == left[7, [3, 0, 3]]).all()
    nothing = np.empty([3, 0], np.int64)
    assert (draws.others(nothing, np.array([[5]] * 3)) == 5).all()


def test_a_draw_of_nothing_is_empty():
    assert draws.distinct(0, 0, np.arange(3), 0, 5).shape == draws.integers(0, 0, np.arange(3), 0, 5).shape == (3, 0)


def test_markov():
    text = draws.markov(2, 0, np.arange(400), 60, 6, 2, chain=9)
    assert text.shape == (400, 60)
    assert (draws.markov(2, 0, np.array([17, 3]), 60, 6, 2, chain=9) == text[[17, 3]]).all()
    assert (draws.markov(2, 0, np.array([17]), 20, 6, 2, chain=9) == text[17, :20]).all()  # a longer one goes on
    after = collections.defaultdict(collections.Counter)
    for a, b, c in zip(text[:, :-2].ravel(), text[:, 1:-1].ravel(), text[:, 2:].ravel(), strict=True):
        after[a, b][c] += 1
    assert len(after) > 30  # some pairs of words follow no other
    for follow in after.values():
        assert len(follow) <= 2
        if follow.total() > 40:
            fits(list(follow.values()))

"""Rows of a task as a plain reader has them, and whether counts are as likely as a law says. For the tests of tasks."""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import stats

from probes.tasks.task import Task
from training.data import NOT_ASKED


class Row(NamedTuple):
    """ids without padding; labels by place, in order; what is said about each label."""

    ids: list[int]
    labels: dict[int, int]
    about: list[dict[str, int]]


def rows_of(law: Task, N: int = 300, seed: int = 5) -> Iterator[Row]:
    rows = law.rows(seed, np.arange(N))
    for n in range(N):
        end = rows.ids_NT.shape[1] if rows.length_N is None else int(rows.length_N[n])
        labels = {t: label for t, label in enumerate(rows.labels_NT[n].tolist()) if label != NOT_ASKED}
        about = [{name: int(values[n, q]) for name, values in rows.about.items()} for q in range(len(labels))]
        yield Row(rows.ids_NT[n, :end].tolist(), labels, about)


def fits(counts, probabilities=None) -> None:
    """Chi-square, uniform unless said: a law this far off would be accepted once in a thousand."""
    counts = np.asarray(counts, float)
    share = np.full(counts.shape, 1 / counts.size) if probabilities is None else np.asarray(probabilities)
    expected = share * counts.sum()
    assert expected.min() > 5
    assert math.isclose(expected.sum(), counts.sum(), rel_tol=1e-9)
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, counts.size - 1) > 1e-3, (statistic, counts)


def near(hits, share: float) -> None:
    """The mean of hits, one of each row, is `share` up to four standard errors."""
    error = max(np.std(hits) / len(hits) ** 0.5, 1 / len(hits))
    assert abs(np.mean(hits) - share) < 4 * error, (np.mean(hits), share, error)


def completed(facts: list[list[int]], answer: list[int]) -> list[bool]:
    """Whether each token of an answer is what most of the facts that agree with it so far say next."""
    right = []
    for t, token in enumerate(answer):
        after = [fact[t] for fact in facts if fact[:t] == answer[:t]]
        right.append(max(sorted(after), key=after.count) == token)
    return right


def digest(law: Task, N: int = 60) -> str:
    """Of some rows, with all that is said about them."""
    rows = law.rows(12345, 10**12 + np.arange(N))
    data = [rows.ids_NT, rows.labels_NT, *(rows.about[name] for name in sorted(rows.about))]
    data += [] if rows.length_N is None else [rows.length_N]
    return hashlib.sha256(b"".join(x.astype("<i8").tobytes() for x in data)).hexdigest()[:16]

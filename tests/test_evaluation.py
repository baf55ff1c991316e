"""How answers to a probe are scored, said and drawn: known answers get known scores."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from rich.console import Console

from probes import evaluation, figures
from probes.after import and_harder
from probes.tasks.recall import parts
from training.data import NOT_ASKED

LONG = parts((60, 20, 10), (16, 2), (16, 4), (32, 4), vocab=64)


def says(answer):
    """An answerer of known words, without an opinion of the label."""
    return lambda batch, _: (answer(batch), np.zeros(batch.labels_BT.shape))


def test_scores():
    """Known answers get known scores, slice by slice."""
    perfect = evaluation.evaluate(says(lambda b: b.labels_BT), LONG)
    assert [(s.slice, s.rows, s.questions) for s in perfect] == [
        ({"length": 16, "pairs": 2}, 60, 120),
        ({"length": 16, "pairs": 4}, 20, 80),
        ({"length": 32, "pairs": 4}, 10, 40),
    ]
    assert all(s.accuracy == s.exact == s.balanced == 1 and s.standard_error == s.nats == 0 for s in perfect)
    assert all((s.chance, s.plateau) == (1 / 32, 1 / s.slice["pairs"]) for s in perfect)
    for s in perfect:
        assert {name: sum(b.questions for b in bins) for name, bins in s.by.items()} == dict.fromkeys(
            ("pair", "slot", "distance"), s.questions
        )

    parrot = evaluation.evaluate(says(lambda b: np.broadcast_to(b.ids_BT[:, 1:2], b.ids_BT.shape)), LONG)
    assert all(s.accuracy == s.plateau and s.exact == 0 for s in parrot)
    assert all([b.accuracy for b in s.by["pair"]] == [1, *[0] * (s.slice["pairs"] - 1)] for s in parrot)
    (score,) = evaluation.evaluate(
        says(lambda b: np.where([[True], [False]], b.labels_BT, 0)), parts(2, (16, 2), vocab=64)
    )
    assert (score.accuracy, score.exact) == (0.5, 0.5)
    assert math.isclose(score.standard_error, 0.5)  # shares 1 and 0: deviation sqrt(1/2), over sqrt(2) rows
    again = evaluation.evaluate(says(lambda b: b.labels_BT), LONG[:1], seed=5)  # other rows
    assert again[0].by != perfect[0].by and again[0].accuracy == 1


def test_scores_of_labelled_places_only():
    """[B, Q] predictions line up with the questions in order of place; too few are refused."""
    (part,) = parts(50, (32, 4), vocab=64)

    def answers(batch, columns):
        right = np.take_along_axis(batch.labels_BT, np.nonzero(batch.labels_BT != NOT_ASKED)[1].reshape(-1, 4), 1)
        right[:, 2] += np.arange(50) % 2  # every other row: one of four wrong
        return np.pad(right, [(0, 0), (0, 3)])[:, :columns], np.full([50, columns], 2.0)

    some, wide = (evaluation.evaluate(lambda b, _, n=n: answers(b, n), [part])[0] for n in (4, 7))
    assert some == wide and (some.accuracy, some.exact, some.nats) == (0.875, 0.5, 2.0)
    with pytest.raises(ValueError, match="ask for 4 a row"):
        evaluation.evaluate(lambda b, _: answers(b, 3), [part])


def test_exact_is_of_whole_answers():
    right = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)
    own = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    assert evaluation._exact(right, own, np.array([[0, 0, 1, -1], [0, 1, 1, 2]])) == 2 / 5
    assert evaluation._exact(right, own, np.zeros([2, 4], int)) == 0
    assert evaluation._balanced(np.array([True, True, False, False]), np.array([5, 5, 5, 9])) == 1 / 3


def test_bins_hold_every_question_once():
    values = np.random.default_rng(0).integers(0, 300, 1000)
    found = evaluation.bins(values, values % 2 == 0)
    assert sum(b.questions for b in found) == 1000 and 4 < len(found) <= evaluation.BINS
    assert all(a.high < b.low for a, b in itertools.pairwise(found)) and (found[0].low, found[-1].high) == (0, 299)
    few = evaluation.bins(np.array([3, 3, 7]), np.array([True, False, True]))
    assert [(b.low, b.high, b.questions, b.accuracy) for b in few] == [(3, 3, 2, 0.5), (7, 7, 1, 1.0)]


def test_harder_questions_are_asked_too():
    asked = [(part.task.length, part.task.pairs) for part in and_harder(LONG)]
    assert asked == [(16, 2), (16, 4), (32, 4), (32, 8)]


SCORES = [
    evaluation.Score("MQAR", {"pairs": n}, 64, 1000, 1000 * n, a, 0.01, a, 0.5, 1.5, 2 / 256, 1 / n, {})
    for n, a in ((4, 0.995), (8, 0.6), (16, 0.06))
]


def test_table_and_json(tmp_path):
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))
    console.print(evaluation.table(SCORES))
    console.file.close()
    text = console.export_text()
    for shown in ("0.9950", "0.0100", "0.2500", "0.0078", "1000", "3000", "1.500"):
        assert shown in text
    assert f"{(0.995 + 0.6 + 0.06) / 3:.4f}" in text  # the mean over slices
    assert json.loads(json.dumps(SCORES[0].json())) == dataclasses.asdict(SCORES[0])
    assert dataclasses.replace(SCORES[1], standard_error=math.nan).json()["standard_error"] is None


def test_figures(tmp_path):
    """Both files are written, the same each time, and the SVG holds every name as text."""
    models = {"attention": SCORES, "GLA": SCORES[:2]}
    png, svg = figures.recall_curve(models, tmp_path / "recall")
    assert png.read_bytes()[:4] == b"\x89PNG" and png.stat().st_size > 10_000
    once = svg.read_text()
    assert all(
        f">{text}<" in once for text in ("attention", "GLA", "accuracy", "some answer of the row's kind", "pairs")
    )
    figures.recall_curve(models, tmp_path / "recall")
    assert svg.read_text() == once
    points = [(0, 0.0), (50, 0.4), (100, 0.993), (150, 0.999)]
    _, svg = figures.learning_curve({"attention": points, "GLA": points[:2]}, tmp_path / "learning", pairs=4, vocab=256)
    assert ">attention, 100 steps<" in svg.read_text() and ">GLA<" in svg.read_text()


def test_names_are_moved_apart():
    heights = figures.apart([1.0, 0.5, 1.0, 0.98, 0.0], least=0.1, low=0.0, high=1.0)
    assert max(heights) <= 1 and min(heights) == 0 and heights[1] == 0.5
    assert min(np.diff(np.sort(heights))) > 0.1 - 1e-9
    assert heights[3] < heights[0] < heights[2] or heights[3] < heights[2] < heights[0]

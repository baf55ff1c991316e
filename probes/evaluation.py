"""How well a model answers a probe: accuracy by slice, beside what guessing would give."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from training.data import NOT_ASKED, Batch


@dataclasses.dataclass(frozen=True)
class Score:
    """One slice of a recall probe: the rows of one length that hold and ask one number of pairs.

    accuracy: mean over rows of the share of a row's questions answered right (Zoology's measure).
    standard_error: of that mean; rows are independent, the questions of a row are not.
    exact: share of rows with every question answered right.
    chance: accuracy of a random value, 2 / vocabulary.
    plateau: accuracy of answering with some value of the row, 1 / pairs.
    """

    length: int
    pairs: int
    rows: int
    accuracy: float
    standard_error: float
    exact: float
    chance: float
    plateau: float


def evaluate(predict: Callable[[Batch], npt.ArrayLike], batches: Iterable[Batch], vocab: int) -> list[Score]:
    """Scores by (length, pairs), shortest first, then fewest pairs; both are read off the rows.

    predict(batch): int ids, the likeliest word at every place [B, T], or at the labelled ones only [B, Q], in the order
        of their places (a row with fewer than Q questions comes first with its own, the rest is ignored).
    Rows that ask nothing are skipped (they fill up a last batch). ValueError if no row asks anything.
    """
    slices: dict[tuple[int, int], list[float]] = {}
    for batch in batches:
        labels_BT = np.asarray(batch.labels_BT)
        right_B = right(np.asarray(predict(batch)), labels_BT)
        length_B = np.sum(np.asarray(batch.pos_BT) >= 0, 1)
        pairs_B = np.sum(labels_BT != NOT_ASKED, 1)
        for length, pairs, hits in zip(length_B.tolist(), pairs_B.tolist(), right_B.tolist(), strict=True):
            if pairs:
                slices.setdefault((length, pairs), []).append(hits / pairs)
    if not slices:
        raise ValueError("nothing to evaluate: no row of these batches asks a question")
    return [_score(*key, np.array(slices[key]), vocab) for key in sorted(slices)]


def right(predicted: npt.NDArray[np.int32], labels_BT: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Questions answered right in each row, [B]; `predicted` as predict returns it."""
    asked_BT = labels_BT != NOT_ASKED
    if predicted.shape != labels_BT.shape:
        B, Q = predicted.shape
        if B != len(labels_BT) or np.max(np.sum(asked_BT, 1), initial=0) > Q:
            raise ValueError(f"predictions are {predicted.shape}: {labels_BT.shape} labels ask for more")
        place_BT = np.clip(np.cumsum(asked_BT, 1) - 1, 0, Q - 1)
        predicted = np.take_along_axis(predicted, place_BT, 1)
    return np.sum(asked_BT & (predicted == labels_BT), 1)


def _score(length: int, pairs: int, shares: npt.NDArray[np.float64], vocab: int) -> Score:
    rows = len(shares)
    error = float(np.std(shares, ddof=1)) / math.sqrt(rows) if rows > 1 else math.nan
    exact = float(np.mean(shares == 1.0))
    return Score(length, pairs, rows, float(np.mean(shares)), error, exact, 2 / vocab, 1 / pairs)


def mean_accuracy(scores: Sequence[Score]) -> float:
    """Mean over slices, each weighing the same (the published figure of a mixture)."""
    return sum(s.accuracy for s in scores) / len(scores)


def table(scores: Sequence[Score], title: str = "Recall") -> Table:
    """A rich table, one line a slice."""
    out = Table(title=title, title_justify="left", title_style="bold")
    for name in ("length", "pairs", "rows", "accuracy", "± s.e.", "whole rows", "plateau 1/pairs", "chance 2/vocab"):
        out.add_column(name, justify="right")
    for s in scores:
        fair = "green" if s.accuracy >= 0.99 else "" if s.accuracy > s.plateau + 2 * s.standard_error else "red"
        numbers = (s.accuracy, s.standard_error, s.exact, s.plateau, s.chance)
        accuracy, *others = (f"{x:.4f}" for x in numbers)
        out.add_row(str(s.length), str(s.pairs), str(s.rows), f"[{fair}]{accuracy}[/]" if fair else accuracy, *others)
    if len(scores) > 1:
        out.add_section()
        out.add_row("all", "", str(sum(s.rows for s in scores)), f"{mean_accuracy(scores):.4f}", "", "", "", "")
    return out


def append_json(scores: Sequence[Score], path: str | pathlib.Path, **context: Any) -> None:
    """Adds a line of JSON a slice to the file: `context` (run, seed, step, state bytes ...), then the score."""
    with open(path, "a", encoding="utf-8") as file:
        for score in scores:
            values = {k: None if v != v else v for k, v in dataclasses.asdict(score).items()}  # JSON has no NaN
            file.write(json.dumps({**context, **values}) + "\n")

"""How well a model answers a task: over all, and by what is known of each question, beside what guessing gives."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from probes.tasks.task import Ints, Part
from training.data import NOT_ASKED, Batch

# A batch, and the most labels that its rows have -> (likeliest word, nats of the label) at every place [B, T], or at
# the labelled ones first, in their order [B, Q].
Answer = Callable[[Batch, int | None], tuple[npt.ArrayLike, npt.ArrayLike]]
TOKENS, ROWS = 1 << 15, 128  # read at once, at most: rows of one length, of whatever law, share a compiled program
BINS = 8  # of what has many values


@dataclasses.dataclass(frozen=True)
class Bin:
    """Questions of which something is between `low` and `high`, both included."""

    low: int
    high: int
    questions: int
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Score:
    """A part of a probe: rows of one law.

    law: the law in words, with its version. slice: what tells it from its fellows.
    accuracy: mean over rows of the share of a row's labels said right (Zoology's measure).
    standard_error: of that mean; rows are independent, the questions of a row are not.
    balanced: mean over the words that are answers of the share said right (MAD's measure).
    exact: share of answers whose every token is right; of rows with everything right, where answers are one token.
    nats: mean negative log-likelihood of a label.
    chance, plateau: accuracy without the row, and with something of the right kind from it (probes/tasks/task.py).
    by: accuracy by pair, slot, distance, depth and so on (Rows.about), where the law tells them.
    """

    law: str
    slice: dict[str, Any]
    length: int
    rows: int
    questions: int
    accuracy: float
    standard_error: float
    balanced: float
    exact: float
    nats: float
    chance: float
    plateau: float | None
    by: dict[str, list[Bin]]

    def json(self) -> dict[str, Any]:
        """As JSON holds it: NaN is null."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def slices(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What laws differ in, of each (Task.says); the length where they differ in nothing."""
    every = [part.task.says for part in parts]
    names = [name for name in every[0] if len({str(said.get(name)) for said in every}) > 1]
    if not names:
        return [{"length": part.task.length} for part in parts]
    return [{name: said[name] for name in names if name in said} for said in every]


def evaluate(
    answer: Answer, parts: Sequence[Part], seed: int | None = None, *, labelled: int | None = None
) -> list[Score]:
    """Asks the test rows of each part, or those of a seed (to validate on).

    labelled: the most labels of a row, which programs are compiled for; None for those of these parts.
    """
    labelled = labelled or max(part.task.asked for part in parts)
    return [_evaluate(answer, part, slice, seed, labelled) for part, slice in zip(parts, slices(parts), strict=True)]


def _evaluate(answer: Answer, part: Part, slice: dict[str, Any], seed: int | None, labelled: int) -> Score:
    task = part.task
    seed = task.test_seed() if seed is None else seed
    B = max(1, min(part.rows, ROWS, TOKENS // task.length))
    found: list[dict[str, npt.NDArray[Any]]] = []
    for first in range(0, part.rows, B):
        index_B = np.arange(first, first + B)  # the last batch is as large as the others: no program of its own
        rows = task.rows(seed, index_B)
        said = answer(task.padded(rows, task.length, index_B < part.rows), labelled)
        best, nats = (at_questions(np.asarray(x), rows.labels_NT) for x in said)
        label = at_questions(rows.labels_NT, rows.labels_NT)
        right = best == label
        if "legal" in rows.about:
            right = rows.about["legal"][:, : best.shape[1]] >> best & 1 == 1
        mine = {**rows.about, "label": label, "right": right & (label != NOT_ASKED), "nats": nats}
        found.append({name: _columns(x[: part.rows - first], task.asked) for name, x in mine.items()})
    about = {name: np.concatenate([batch[name] for batch in found]) for name in found[0] if name != "legal"}
    label_NQ, right_NQ, nats_NQ = (about.pop(name) for name in ("label", "right", "nats"))
    own_NQ = label_NQ >= 0
    share_N = (right_NQ & own_NQ).sum(1) / own_NQ.sum(1)
    answer_NQ = about.pop("answer", np.zeros(label_NQ.shape, np.int64))
    return Score(
        law=task.name,
        slice=slice,
        length=task.length,
        rows=part.rows,
        questions=int(own_NQ.sum()),
        accuracy=float(share_N.mean()),
        standard_error=float(share_N.std(ddof=1)) / math.sqrt(part.rows) if part.rows > 1 else math.nan,
        balanced=_balanced(right_NQ[own_NQ], label_NQ[own_NQ]),
        exact=_exact(right_NQ, own_NQ, answer_NQ),
        nats=float(nats_NQ[own_NQ].mean()),
        chance=task.chance,
        plateau=task.plateau,
        by={name: bins(values[own_NQ], right_NQ[own_NQ]) for name, values in about.items()},
    )


def _columns(x: npt.NDArray[Any], Q: int) -> npt.NDArray[Any]:
    return np.pad(x, [(0, 0), (0, Q - x.shape[1])], constant_values=0 if x.dtype == bool else -1)


def at_questions(x: npt.NDArray[Any], labels_NT: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """What stands at each row's labelled places, in their order, [N, Q]: Q the most labels of a row.

    x: [N, T]; or [N, Q'], the labelled places first, as models read them (then it is cut to Q).
    """
    asked_NT = labels_NT != NOT_ASKED
    Q = int(asked_NT.sum(1).max())
    if x.shape == labels_NT.shape:
        order = np.argsort(~asked_NT, axis=1, kind="stable")[:, :Q]
        return np.take_along_axis(x, order, 1)
    if len(x) != len(labels_NT) or x.shape[1] < Q:
        raise ValueError(f"answers are {x.shape}: {labels_NT.shape} labels ask for {Q} a row")
    return x[:, :Q]


def _balanced(right: npt.NDArray[np.bool_], label: Ints) -> float:
    words, which = np.unique(label, return_inverse=True)
    count = np.bincount(which, minlength=len(words))
    return float(np.mean(np.bincount(which, right, minlength=len(words)) / count))


def _exact(right_NQ: npt.NDArray[np.bool_], own_NQ: npt.NDArray[np.bool_], answer_NQ: Ints) -> float:
    each = np.arange(len(right_NQ))[:, None] * (answer_NQ.max() + 1) + answer_NQ
    _, which = np.unique(each[own_NQ], return_inverse=True)
    return float(np.mean(np.bincount(which, ~right_NQ[own_NQ]) == 0))


def bins(values: Ints, right: npt.NDArray[np.bool_]) -> list[Bin]:
    """Accuracy by value; where there are many, in bins that hold about as many questions each."""
    known = np.unique(values)
    if len(known) > BINS:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1), method="lower")).astype(np.int64)
        lows, highs = edges[:-1].tolist(), [*(edges[1:-1] - 1).tolist(), int(edges[-1])]
    else:
        lows = highs = known.tolist()
    out = []
    for low, high in zip(lows, highs, strict=True):
        mine = right[(values >= low) & (values <= high)]
        if len(mine):
            out.append(Bin(low, high, len(mine), float(mine.mean())))
    return out


def mean_accuracy(scores: Sequence[Score]) -> float:
    """Mean over slices, each weighing the same (the published figure of a mixture)."""
    return sum(s.accuracy for s in scores) / len(scores)


def named(slice: dict[str, Any]) -> str:
    """A slice in words."""
    return ", ".join(f"{name} {value}" for name, value in slice.items())


def table(scores: Sequence[Score], title: str = "Recall") -> Table:
    """A rich table, one line a slice."""
    out = Table(title=title, title_justify="left", title_style="bold")
    for name in (*scores[0].slice, "rows", "accuracy", "± s.e.", "exact", "nats", "plateau", "chance"):
        out.add_column(name, justify="right")
    for s in scores:
        bar = s.chance if s.plateau is None else s.plateau
        fair = "green" if s.accuracy >= 0.99 else "" if s.accuracy > bar + 2 * s.standard_error else "red"
        plateau = "" if s.plateau is None else f"{s.plateau:.4f}"
        accuracy = f"[{fair}]{s.accuracy:.4f}[/]" if fair else f"{s.accuracy:.4f}"
        numbers = (f"{s.standard_error:.4f}", f"{s.exact:.4f}", f"{s.nats:.3f}", plateau, f"{s.chance:.4f}")
        out.add_row(*map(str, s.slice.values()), str(s.rows), accuracy, *numbers)
    if len(scores) > 1:
        out.add_section()
        blank = [""] * (len(scores[0].slice) - 1)
        out.add_row("all", *blank, str(sum(s.rows for s in scores)), f"{mean_accuracy(scores):.4f}", *[""] * 5)
    return out

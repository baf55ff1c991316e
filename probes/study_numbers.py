"""What a study's ledger says, in numbers: which rows count, each cell's best setting, ranks, verdicts on claims."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from probes.evaluation import named
from probes.matching import Matched, Resolved
from probes.study import Claim, Numbers, Study

Row = dict[str, Any]
Score = dict[str, Any]
Setting = tuple[float, float | None, float]  # Numbers.setting
Said = Literal["seen", "not seen", "the opposite", "not testable here", "not trained yet"]
VERDICTS: tuple[Said, ...] = ("seen", "not seen", "the opposite", "not testable here", "not trained yet")
CEILING = 0.99  # an accuracy from which on cells are not told apart
FAR = 0.1  # in accuracy: two that guess do not differ by so much in every seed
NEAR = 0.02  # above guessing, by which an accuracy is still taken for guessing
ROUND = 1e-9  # what the last digits of a sum may miss


@dataclasses.dataclass(frozen=True)
class Result:
    """A cell and its arms that are done.

    arms: how many the study lists. settings: rows of each setting, by seed. best: the setting with the best mean of
    `validation`, of those with the most seeds. rank: by the mean of `test` at their best settings; equal
    means share one. None while nothing is trained. group: the choice of `study.within`; ranks are among its cells.
    """

    resolved: Resolved
    arms: int
    settings: dict[Setting, list[Row]]
    best: Setting | None
    rank: int | None = None
    group: str = ""

    @property
    def name(self) -> str:
        return self.resolved.cell.name

    @property
    def rows(self) -> list[Row]:
        """Of all settings."""
        return [row for rows in self.settings.values() for row in rows]

    @property
    def chosen(self) -> list[Row]:
        """Of the best setting, by seed."""
        return [] if self.best is None else self.settings[self.best]

    @property
    def tests(self) -> list[float]:
        return [row["test"] for row in self.chosen]

    @property
    def test(self) -> float:
        """The mean over seeds."""
        return mean(self.tests)

    @property
    def spread(self) -> float:
        """Between the least and the most of the seeds."""
        return max(self.tests) - min(self.tests)


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def results(study: Study, cells: Sequence[Resolved], rows: Iterable[Row]) -> list[Result]:
    """Of every cell, in the study's order. Rows of another digest, or of arms that the study lacks, do not count."""
    digests = {resolved.digest for resolved in cells}
    known = {(row["digest"], Numbers(**row["arm"])): row for row in rows if row["digest"] in digests}
    found = []
    for resolved in cells:
        arms = study.arms(resolved.cell)
        settings: dict[Setting, list[Row]] = {}
        for arm in arms:
            if (row := known.get((resolved.digest, arm))) is not None:
                settings.setdefault(arm.setting, []).append(row)
        group = dict(resolved.cell.choices).get(study.within, "")
        found.append(Result(resolved, len(arms), settings, _best(settings), group=group))
    goods = {(r.group, r.name): good(r.test, r.chosen[0]["higher"]) for r in found if r.chosen}
    ranks = {
        (group, name): 1 + sum(other > mine + ROUND for (same, _), other in goods.items() if same == group)
        for (group, name), mine in goods.items()
    }
    return [dataclasses.replace(result, rank=ranks.get((result.group, result.name))) for result in found]


def good(value: float, higher: bool) -> float:
    """A measure so that more of it is better; what is not a number is worst."""
    return -math.inf if math.isnan(value) else value if higher else -value


def _best(settings: Mapping[Setting, Sequence[Row]]) -> Setting | None:
    most = max(map(len, settings.values()), default=0)
    means = {
        setting: good(mean([row["validation"] for row in rows]), rows[0]["higher"])
        for setting, rows in settings.items()
        if len(rows) == most
    }
    return max(means, key=lambda setting: means[setting]) if means else None


def ranked(found: Sequence[Result]) -> list[Result]:
    """Those that are trained, from the best to the last; group by group, in the study's order."""
    groups = list(dict.fromkeys(result.group for result in found))
    trained = (result for result in found if result.rank)
    return sorted(trained, key=lambda result: (groups.index(result.group), result.rank or 0))


def slices(found: Sequence[Result]) -> list[str]:
    """Names of the parts of a probe, of all cells in the order that they come; none where each has one alone."""
    every = [[named(score["slice"]) for score in result.chosen[0]["scores"]] for result in found if result.chosen]
    if max(map(len, every), default=0) < 2:
        return []
    return list(dict.fromkeys(name for names in every for name in names))


def of_slice(row: Row, name: str) -> Score | None:
    return next((score for score in row["scores"] if named(score["slice"]) == name), None)


def asked(result: Result, name: str) -> list[float]:
    """The accuracies of a slice, by seed; of all for no name. Fewer, or none, where it was not asked."""
    if not name:
        return result.tests
    return [score["accuracy"] for row in result.chosen if (score := of_slice(row, name)) is not None]


def guess(score: Score) -> float:
    """What one reaches that does not know which of a row's answers is asked for; without a row, where it says none."""
    return score["chance"] if score["plateau"] is None else score["plateau"]


def guesses(row: Row) -> float | None:
    """The same over all of a row's slices, as `test` is their mean; None for text."""
    return mean([guess(score) for score in row["scores"]]) if row["scores"] else None


def guessing(found: Sequence[Result]) -> float | None:
    """The same over all cells; None where they are of several tasks, of which a mean says nothing."""
    if len({result.group for result in found}) > 1:
        return None
    known = [x for result in found if result.chosen and (x := guesses(result.chosen[0])) is not None]
    return mean(known) if known else None


def guessers(trained: Sequence[Result]) -> dict[str, dict[str, float]]:
    """What guessing reaches, over all ("") and by slice; for each choice of `study.within`, as tasks differ in it."""
    out = {}
    for group in dict.fromkeys(result.group for result in trained):
        mine = [result for result in trained if result.group == group]
        if (bar := guessing(mine)) is not None:
            scores = [score for result in mine for score in result.chosen[0]["scores"]]
            out[f"guessing, {group}" if group else "guessing"] = {"": bar} | {
                named(score["slice"]): guess(score) for score in scores
            }
    return out


@dataclasses.dataclass(frozen=True)
class Goal:
    """How soon the best setting reached the study's goal: medians of the `reached` seeds of `seeds`."""

    steps: float
    seconds: float
    reached: int
    seeds: int


def goal(result: Result) -> Goal | None:
    """None where the study has no goal."""
    rows = result.chosen
    if not rows or rows[0]["goal"] is None:
        return None
    reached = [(row["goal_step"], row["goal_cpu_seconds"]) for row in rows if row["goal_step"] is not None]
    steps, seconds = np.median(reached, axis=0) if reached else (math.nan, math.nan)
    return Goal(float(steps), float(seconds), len(reached), len(rows))


def once(found: Iterable[Result]) -> list[Row]:
    """All rows that count: those of cells that are one experiment under two names are not counted twice."""
    every = {result.resolved.digest: result.rows for result in found}
    return [row for rows in every.values() for row in rows]


def worst_match(found: Iterable[Result]) -> tuple[Result, Matched] | None:
    """The cell that misses a target by the largest share; None where nothing was to be matched."""
    every = [(result, matched) for result in found for matched in result.resolved.matched]
    return max(every, key=lambda pair: abs(pair[1].off)) if every else None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What rows say of a claim.

    why: it cannot be tested here. more, less: means of the claim's two cells over the seeds that both have.
    differences: by how much the first is better, by seed.
    """

    claim: Claim
    said: Said
    why: str = ""
    more: float = math.nan
    less: float = math.nan
    differences: tuple[float, ...] = ()

    @property
    def difference(self) -> float:
        return mean(self.differences)


def verdicts(study: Study, found: Sequence[Result]) -> list[Verdict]:
    return [_verdict(claim, found) for claim in study.claims]


def line(found: Sequence[Result], choice: str) -> list[Result]:
    """The trained cells of a choice, by bytes of state."""
    mine = [r for r in found if r.chosen and choice in dict(r.resolved.cell.choices).values()]
    return sorted(mine, key=lambda result: result.resolved.costs["state_bytes"])


def at_bytes(cells: Sequence[Result], size: float, values: Sequence[float]) -> float | None:
    """Between cells of a line, along the logarithm of their bytes; None outside of them. values: one of each."""
    sizes = [result.resolved.costs["state_bytes"] for result in cells]
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        return None
    return float(np.interp(math.log(size), np.log(sizes), values))


def _verdict(claim: Claim, found: Sequence[Result]) -> Verdict:
    if claim.untestable:
        return Verdict(claim, "not testable here", claim.untestable)
    names = (claim.more, claim.less)
    lines = [line(found, name) if claim.at else [r for r in found if r.name == name and r.chosen] for name in names]
    rows = [[{row["arm"]["seed"]: row for row in result.chosen} for result in cells] for cells in lines]
    seeds = sorted(set.intersection(*(set(of) for cells in rows for of in cells))) if all(lines) else []
    if not seeds:
        return Verdict(claim, "not trained yet")
    values: list[list[float]] = []
    bars: list[float] = []
    for cells, of in zip(lines, rows, strict=True):
        read = [[_measured(mine[seed], claim.slice) for mine in of] for seed in seeds]
        if any(one is None for side in read for one in side):
            return Verdict(claim, "not testable here", f"these cells are not both asked {claim.slice!r}")
        known = [[one for one in side if one] for side in read]
        each = [at_bytes(cells, claim.at, [v for v, _ in side]) if claim.at else side[0][0] for side in known]
        if None in each:
            return Verdict(
                claim, "not testable here", f"these cells do not both have about {claim.at:,} bytes of state"
            )
        values.append([value for value in each if value is not None])
        bars.append(mean([bar for side in known for _, bar in side]))
    means = [mean(side) for side in values]
    higher = lines[0][0].chosen[0]["higher"]
    differences = tuple((more - less) * (1 if higher else -1) for more, less in zip(*values, strict=True))

    def verdict(said: Said, why: str = "") -> Verdict:
        return Verdict(claim, said, why, means[0], means[1], differences)

    if not math.isnan(bars[0]):  # an accuracy
        if min(means) >= CEILING - ROUND:
            return verdict("not testable here", f"both reach {CEILING:.0%} and more")
        # What is guessed without the key may itself be remembered: where all seeds differ by far, one remembers more.
        apart = min(differences) > FAR or max(differences) < -FAR
        if not apart and all(value <= bar + NEAR + ROUND for value, bar in zip(means, bars, strict=True)):
            return verdict("not testable here", "both are no better than guessing")
    if len(seeds) < 2:
        return verdict("not testable here", "one seed alone says nothing of the next")
    if min(differences) > 0 and mean(differences) >= claim.least - ROUND:
        return verdict("seen")
    if max(differences) < 0 and mean(differences) <= ROUND - claim.least:
        return verdict("the opposite")
    return verdict("not seen")


def _measured(row: Row, slice: str) -> tuple[float, float] | None:
    """A row's measure and what guessing reaches (NaN for text), of all or of a slice; None if it lacks the slice."""
    if not slice:
        bar = guesses(row)
        return row["test"], math.nan if bar is None else bar
    score = of_slice(row, slice)
    return None if score is None else (score["accuracy"], guess(score))

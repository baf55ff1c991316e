"""A study on paper: an experiment, the axes along which it is changed, and what makes its arms comparable.

A study is a file in configs/studies/ that ends in `tiers`, studies by size: "smoke" for a look, "laptop", "paper".
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any, Literal

from layers.fields import one_of
from training.experiment import Experiment
from training.settings import ConfigError, replaced

Quantity = Literal["parameters", "table_parameters", "state_bytes", "flops"]
VERSION = 1  # of how arms are trained and asked: a new number makes what is in a ledger be done again


@dataclasses.dataclass(frozen=True)
class Match:
    """Arms are made equal in something: fields are turned until they are as close to it as sizes allow.

    what: "parameters" of the model; "table_parameters", those of tables that are looked up; "state_bytes" of one
        sequence as long as the longest that is asked; "flops" of a training step, by token.
    fields: dotted fields of the experiment that are turned, all to the same; values: what they may be.
    target: None for what the study's first cell has, which is left as it is.
    """

    what: Quantity
    fields: tuple[str, ...]
    values: tuple[int, ...]
    target: float | None = None

    def __post_init__(self):
        one_of(self)
        for name in ("fields", "values"):
            if not getattr(self, name):
                raise ConfigError(f"Match.{name} is empty: say what is turned, and what it may be")

    def turned(self, experiment: Experiment, value: int) -> Experiment:
        for field in self.fields:
            experiment = replaced(experiment, field, value)
        return experiment


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of an axis.

    name: what reports call it. changes: (dotted field of the experiment, its value).
    by: for cells of this choice, what is turned instead in the study's match of the same `what`.
    """

    name: str
    changes: tuple[tuple[str, Any], ...] = ()
    by: tuple[Match, ...] = ()


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is varied: its choices are crossed with those of the other axes."""

    name: str
    choices: tuple[Choice, ...]


def axis(name: str, field: str, values: Mapping[str, Any] | tuple[Any, ...]) -> Axis:
    """An axis of one field: its values by name, or as they are."""
    named = values if isinstance(values, Mapping) else {str(value): value for value in values}
    return Axis(name, tuple(Choice(str(said), ((field, value),)) for said, value in named.items()))


def of_experiments(name: str, values: Mapping[str, Experiment]) -> Axis:
    """An axis of tasks, say: each changes data, model, optimiser and training. Axes of memories come after it."""
    fields = ("data", "model", "optimizer", "train")
    return Axis(
        name,
        tuple(
            Choice(said, tuple((field, getattr(experiment, field)) for field in fields))
            for said, experiment in values.items()
        ),
    )


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that a paper says, as a comparison of two cells.

    says: the claim. source: paper, table or figure. more, less: cells (Cell.name); the first does better, seed by seed.
    least: by how much on average, to count. slice: a slice's name, as in "length 512", if the claim is of it alone.
    at: bytes of state; more and less are then choices of an axis, each read on the line through its cells.
    untestable: why it cannot be judged at this size; then the cells are not compared.
    """

    says: str
    source: str
    more: str = ""
    less: str = ""
    least: float = 0.01
    slice: str = ""
    at: int = 0
    untestable: str = ""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A published point: of a cell's name, or of any other.

    choice: of an axis, to be read beside it on the line through its cells, at as many bytes of state. slice: of ours.
    """

    name: str
    value: float
    state_bytes: int | None = None
    choice: str = ""
    slice: str = ""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What arms of a cell differ in: numbers alone, so that all of them are one program.

    rate: peak learning rate. weight_decay: None for the optimiser's. init: a factor of the matrices at the start.
    """

    seed: int
    rate: float
    weight_decay: float | None = None
    init: float = 1.0

    @property
    def setting(self) -> tuple[float, float | None, float]:
        """All but the seed."""
        return self.rate, self.weight_decay, self.init


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of arms: cells of the axes, which differ in shape, times numbers, which train together.

    about: the question, in a line. base: what every arm is, but for what axes change.
    rates: peak learning rates; none for the optimiser's own. weight_decays, inits: likewise. The best setting of a cell
        is chosen by its validation rows, which are neither trained on nor tested.
    seeds: arms of each setting. match: what cells are made equal in, one after the other.
    goal: of the validation; an arm that reaches it stops, and the steps are told. None: all train to the end.
    checks: validations over a training. together: arms of a program at most; 0 for all of a cell.
    versus: the axis that the report's main picture runs along; "state_bytes" for accuracy beside bytes of state.
    within: an axis whose choices cannot be compared, such as tasks: cells are ranked among those of the same choice.
    claims, references: what papers say.
    notes: how results are to be read: differences from the papers' settings, and what cannot be seen here.
    """

    about: str
    base: Experiment
    axes: tuple[Axis, ...]
    rates: tuple[float, ...] = ()
    weight_decays: tuple[float | None, ...] = (None,)
    inits: tuple[float, ...] = (1.0,)
    seeds: int = 3
    match: tuple[Match, ...] = ()
    goal: float | None = None
    checks: int = 16
    together: int = 0
    versus: str = ""
    within: str = ""
    claims: tuple[Claim, ...] = ()
    references: tuple[Reference, ...] = ()
    notes: str = ""

    def __post_init__(self):
        for field in ("axes", "weight_decays", "inits"):
            if not getattr(self, field):
                raise ConfigError(f"Study.{field} is empty: give it at least one value")
        for field, least in (("seeds", 1), ("checks", 1), ("together", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"Study.{field} is {getattr(self, field)}: it must be at least {least}")
        if low := [rate for rate in self.rates if rate <= 0]:
            raise ConfigError(f"Study.rates has {low[0]}: learning rates must be above 0")
        for axis in self.axes:
            names = [choice.name for choice in axis.choices]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ConfigError(f"axis {axis.name!r} has two choices named {min(twice)!r}: tell them apart")
        known = [axis.name for axis in self.axes]
        if self.versus not in ("", "state_bytes", *known):
            raise ConfigError(
                f"Study.versus is {self.versus!r}: it must be state_bytes or an axis ({', '.join(known)})"
            )
        if self.within not in ("", *known):
            raise ConfigError(f"Study.within is {self.within!r}: it must be an axis ({', '.join(known)})")
        cells = {cell.name for cell in self.cells}
        choices = {choice.name for axis in self.axes for choice in axis.choices}
        for claim in self.claims:
            kind, every = ("choice", choices) if claim.at else ("cell", cells)
            for name in () if claim.untestable else (claim.more, claim.less):
                if name not in every:
                    raise ConfigError(
                        f"a claim names the {kind} {name!r}, which is not one of {', '.join(sorted(every))}"
                    )
        for point in self.references:
            if point.choice and (point.choice not in choices or point.state_bytes is None):
                raise ConfigError(
                    f"the reference {point.name!r} is read beside {point.choice!r}: that must be a choice of an axis, "
                    "and the reference needs state_bytes"
                )

    @property
    def cells(self) -> "tuple[Cell, ...]":
        """Every combination of the axes' choices, before anything is matched."""
        found = []
        for choices in itertools.product(*(axis.choices for axis in self.axes)):
            experiment = self.base
            for choice in choices:
                for field, value in choice.changes:
                    experiment = replaced(experiment, field, value)
            said = {axis.name: choice.name for axis, choice in zip(self.axes, choices, strict=True)}
            turned = {match.what: match for choice in choices for match in choice.by}
            matches = tuple(turned.get(match.what, match) for match in self.match)
            found.append(Cell(tuple(said.items()), experiment, matches))
        return tuple(found)

    def arms(self, cell: "Cell") -> tuple[Numbers, ...]:
        """Of a cell, the first seed of every setting first."""
        rates = self.rates or (cell.experiment.optimizer.lr,)
        settings = itertools.product(range(self.seeds), rates, self.weight_decays, self.inits)
        return tuple(Numbers(*setting) for setting in settings)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A combination of choices: arms of one shape.

    choices: (axis, choice). matches: what is to be turned yet; () once it is (probes/matching.py).
    """

    choices: tuple[tuple[str, str], ...]
    experiment: Experiment
    matches: tuple[Match, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(choice for _, choice in self.choices)

    def digest(self, study: Study, data: str) -> str:
        """A short hash of everything that an arm's result depends on, its numbers apart. data: the dataset's digest."""
        experiment = self.experiment
        train = dataclasses.replace(experiment.train, seed=0)
        said = [experiment.model, experiment.data, data, experiment.optimizer, train, study.goal, study.checks, VERSION]
        return hashlib.sha256("\n".join(map(str, said)).encode()).hexdigest()[:12]

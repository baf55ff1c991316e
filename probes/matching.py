"""What a model costs, and how arms of a study are made equal in it (probes/study.py says in what)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models.parameters import Structure, flatten
from probes.bottleneck import for_task
from probes.study import Cell, Match, Quantity, Study
from probes.tasks.task import Probe
from training.data import Dataset
from training.experiment import Experiment
from training.settings import ConfigError
from training.summary import flops_per_token, parameter_count, state_bytes


@dataclasses.dataclass(frozen=True)
class Matched:
    """A quantity that was to be equal: what it is, and what it was to be; the field that was turned, and to what."""

    what: Quantity
    value: float
    target: float
    field: str
    chosen: int | None  # None where nothing was turned

    @property
    def off(self) -> float:
        """By what share it misses the target."""
        return self.value / self.target - 1 if self.target else float(self.value != self.target)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A cell whose matches are done, and what it costs. digest: Cell.digest."""

    cell: Cell
    digest: str
    matched: tuple[Matched, ...]
    costs: dict[str, float]


def longest(experiment: Experiment) -> int:
    """Tokens of the longest row that is trained on or asked."""
    data = experiment.data
    return max([data.T, *(part.task.length for part in data.test)]) if isinstance(data, Probe) else data.T


class Costs:
    """Of an experiment, each found when it is asked for: nothing is computed but shapes."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        model = for_task(experiment.model, experiment.data)  # what is trained
        self.experiment, self.dataset = dataclasses.replace(experiment, model=model), dataset

    @functools.cached_property
    def _model(self) -> tuple[Any, Structure]:
        shapes = jax.eval_shape(lambda: self.experiment.model.build(rngs=nnx.Rngs(0)))
        return shapes, flatten(shapes)[1]

    def __call__(self, what: Quantity) -> float:
        model, structure = self._model
        if what == "flops":
            dataset = self.dataset
            return flops_per_token(self.experiment, structure, dataset.labelled, prefix=dataset.prefix > 0)
        if what == "state_bytes":
            return state_bytes(model, longest(self.experiment))
        specs = structure.specs
        return parameter_count({n: s for n, s in specs.items() if what == "parameters" or s.table})

    def all(self) -> dict[str, float]:
        quantities: tuple[Quantity, ...] = ("parameters", "table_parameters", "state_bytes", "flops")
        return {what: self(what) for what in quantities}


def resolve(study: Study, dataset_of: Callable[[Experiment], Dataset]) -> list[Resolved]:
    """The study's cells, matched. ConfigError where no value of the field that is turned makes a model."""
    found: list[Resolved] = []
    targets: dict[int, float] = {}
    for cell in study.cells:
        experiment, matched = cell.experiment, []
        for number, match in enumerate(cell.matches):
            measure = Costs(experiment, dataset_of(experiment))
            given = study.match[number].target
            if given is None and not found:  # the first cell is what the others are measured by
                targets[number] = measure(match.what)
                matched.append(Matched(match.what, targets[number], targets[number], _last(match), None))
                continue
            target = targets[number] if given is None else given
            experiment, at, value = _solve(cell, experiment, match, target, dataset_of)
            matched.append(Matched(match.what, value, target, _last(match), at))
        # What an earlier match made equal, a later one may have moved: say what it is now.
        dataset = dataset_of(experiment)
        costs = Costs(experiment, dataset).all()
        matched = [dataclasses.replace(m, value=costs[m.what]) for m in matched]
        done = dataclasses.replace(cell, experiment=experiment, matches=())
        found.append(Resolved(done, done.digest(study, dataset.digest), tuple(matched), costs))
    return found


def _last(match: Match) -> str:
    """What is turned, in a word: the last part of the fields' names."""
    return " and ".join(dict.fromkeys(field.rpartition(".")[2] for field in match.fields))


def _solve(
    cell: Cell, experiment: Experiment, match: Match, target: float, dataset_of: Callable[[Experiment], Dataset]
) -> tuple[Experiment, int, float]:
    """The value of the field that comes closest, found by halving: quantities grow with sizes.

    Values that make no model (a width that heads do not divide) are passed over.
    """
    known: dict[int, tuple[Experiment, float]] = {}
    refused: ValueError | None = None
    values = sorted(set(match.values))

    def measured(value: int) -> float:
        if value not in known:
            changed = match.turned(experiment, value)
            known[value] = changed, Costs(changed, dataset_of(changed))(match.what)
        return known[value][1]

    while values:
        low, high = 0, len(values) - 1
        at = low
        try:
            while high - low > 1:
                at = (low + high) // 2
                low, high = (at, high) if measured(values[at]) <= target else (low, at)
            for at in (low, high):
                measured(values[at])
        except ValueError as error:
            refused = error
            del values[at]
            continue
        best = min(values[low], values[high], key=lambda value: abs(measured(value) - target))
        return known[best][0], best, known[best][1]
    raise ConfigError(f"{cell.name}: no value of {_last(match)} in Match.values makes a model: {refused}")

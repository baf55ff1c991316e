"""The studies that are shipped, by name, and what `python ablate.py STUDY` was asked for."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from probes.study import Study
from training.settings import ROOT, ConfigError, execute, replaced

USUAL = "laptop"  # the tier of a study that is named without one


@dataclasses.dataclass(frozen=True)
class Options:
    """A study: what is not in its ledger is trained, and its report is written.

    folder: of the ledger, pictures and report; None for results/STUDY (of the laptop tier), else results/STUDY@TIER.
    only: cells to train, by name (quote those with spaces); none for all. The report is of all that is known.
    seeds: of every setting; None for what the study says. More than before trains those that are missing.
    rates: peak learning rates; none for those of the study. steps: of training; None for what the study says.
    together: arms of a program at most (memory grows with them); None for what the study says, 0 for all of a cell.
    workers: processes that train a cell each, on cores of their own, on CPUs alone. A cell cannot fill many
        cores, so as many as there are cores are done soonest; each takes memory of its own.
    dry_run: print the cells, what they are matched in and how many arms are missing, and stop.
    """

    folder: Path | None = None
    only: tuple[str, ...] = ()
    seeds: int | None = None
    rates: tuple[float, ...] = ()
    steps: int | None = None
    together: int | None = None
    workers: int = 1
    dry_run: bool = False


def study_files() -> dict[str, Path]:
    """The studies of this repository, by name."""
    return {path.stem: path for path in sorted((ROOT / "configs/studies").glob("*.py")) if path.stem != "__init__"}


def find(name: str) -> tuple[Study, str]:
    """A study by NAME, NAME@TIER or a file's path (FILE.py or FILE.py@TIER), and what it is called.

    Raises ConfigError for a name that none has.
    """
    stem, _, tier = name.partition("@")
    files = study_files()
    path = files.get(stem) or Path(stem)
    if path.suffix != ".py" or not path.is_file():
        near = difflib.get_close_matches(stem, files, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "give a .py file, a run folder, or one of"
        raise ConfigError(f"there is no study {stem!r}: {hint} " + ("" if near else ", ".join(files)))
    tiers = getattr(execute(path), "tiers", None)
    if not isinstance(tiers, dict) or not tiers or not all(isinstance(s, Study) for s in tiers.values()):
        raise ConfigError(f"{path}: it has no `tiers`; end the file in tiers = {{'laptop': Study(...)}}")
    tier = tier or (USUAL if USUAL in tiers else next(iter(tiers)))
    if tier not in tiers:
        raise ConfigError(f"{stem} has no tier {tier!r}: it has {', '.join(tiers)}")
    return tiers[tier], path.stem if tier == USUAL else f"{path.stem}@{tier}"


def _stepped(study: Study, steps: int) -> Study:
    """With other steps in the base, and in choices that bring a training of their own (`of_experiments`)."""

    def other(field: str, value: Any) -> tuple[str, Any]:
        return (field, dataclasses.replace(value, steps=steps) if field == "train" else value)

    axes = tuple(
        dataclasses.replace(
            axis,
            choices=tuple(
                dataclasses.replace(choice, changes=tuple(other(*change) for change in choice.changes))
                for choice in axis.choices
            ),
        )
        for axis in study.axes
    )
    return dataclasses.replace(study, base=replaced(study.base, "train.steps", steps), axes=axes)


def changed(study: Study, options: Options) -> Study:
    """The study with what the options change."""
    for field in ("seeds", "together"):
        if (value := getattr(options, field)) is not None:
            study = dataclasses.replace(study, **{field: value})
    if options.rates:
        study = dataclasses.replace(study, rates=options.rates)
    if options.steps is not None:
        if options.steps < 1:
            raise ConfigError(f"steps is {options.steps}: it must be at least 1")
        study = _stepped(study, options.steps)
    names = [cell.name for cell in study.cells]
    for name in options.only:
        if name not in names:
            near = difflib.get_close_matches(name, names, 2)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"cells are {'; '.join(names)}"
            raise ConfigError(f"only names the cell {name!r}, which the study has not: {hint}")
    return study

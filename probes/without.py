"""A trained run asked its own held-out data again, untrained, without each of its parts: `python ablate.py RUN`.

Each part is compared with the whole model on the same rows. What a part is worth to this model is not what the model
would be had it been trained without it: that is for a study.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from probes import without_report
from probes.asking import newest
from probes.parts import Asked, Piece, Rows
from probes.small_runs import Ledger
from training.flags import parse
from training.run import load_model
from training.settings import ConfigError

MISSING = {  # what is said of a model that has none of a part
    "layers": "this model has no layers",
    "tables": "this model looks nothing up: there are no tables",
    "writes": "this model has no memory that is read token by token: there are no writes",
    "window": "no layer of this model has a window to narrow",
}
BATCHES, BATCHES_WRITES = 16, 2


@dataclasses.dataclass(frozen=True)
class Options:
    """A trained model, asked its held-out data again without each of its parts.

    parts: layers, tables, writes, window; none for all that the model has.
    batches: of held-out data; None for 16, and for 2 of writes, whose tokens are read one by one.
    step: the checkpoint to ask; None for the newest.
    folder: where ablation.jsonl and the report are; None for the run's own folder, ablation/.
    """

    parts: tuple[str, ...] = ()
    batches: int | None = None
    step: int | None = None
    folder: Path | None = None


def ablate_run(folder: Path, flags: Sequence[str], command: str) -> Path:
    """Asks what the ledger does not have, and writes the report; returns its path.

    Raises ConfigError, CheckpointError or DataError, each in one line.
    """
    options = parse(Options(), flags, program=f"python ablate.py {folder}")
    for part in options.parts:
        if part not in MISSING:
            raise ConfigError(f"there is no part {part!r}: they are {', '.join(MISSING)}")
    if options.batches is not None and options.batches < 1:
        raise ConfigError(f"batches is {options.batches}: it must be at least 1")
    model, _, dataset = load_model(folder, options.step)
    step = newest(folder) if options.step is None else options.step
    askers = functools.cache(functools.partial(Asked, model, dataset))  # parts that share batches share programs
    found: dict[str, tuple[Asked, list[Piece]]] = {}
    for part in dict.fromkeys(options.parts or MISSING):
        asked = askers(options.batches or (BATCHES_WRITES if part == "writes" else BATCHES))
        pieces = list(getattr(asked, part)())
        if pieces:
            found[part] = (asked, pieces)
        elif options.parts:
            raise ConfigError(MISSING[part])
    where, console = options.folder or folder / "ablation", Console()
    ledger = Ledger(where / "ablation.jsonl")
    run = {"run": folder.name, "step": step}
    for part, (asked, pieces) in found.items():
        key = {**run, "part": part, "batches": asked.batches}
        missing = [piece for piece in pieces if not ledger.has(**key, **piece.key)]
        if missing and not asked.whole(part).weight_R.any():
            nothing = f"{part}: nothing is asked there in {asked.batches} batches: raise --batches, or leave it out"
            if options.parts:
                raise ConfigError(nothing)
            console.print(nothing)
            continue
        for number, piece in enumerate(missing, 1):
            start = time.perf_counter()
            with console.status(f"{part}, {number} of {len(missing)}: {without_report.named(piece.key)}"):
                row = compared(asked.whole(part), piece.ask())
            seconds = round(time.perf_counter() - start, 2)
            row = {**key, **piece.key, "measure": asked.measure, **row, "seconds": seconds, "command": command}
            ledger.add(row)
            console.print(without_report.said(row), highlight=False, markup=False, soft_wrap=True)
    return without_report.write([row for row in ledger.rows if run.items() <= row.items()], where, folder.name)


def compared(whole: Rows, without: Rows) -> dict[str, Any]:
    """The value of both, their difference (without less whole), and its standard error, paired by row.

    A value is a ratio of sums over rows, so the error is that of a ratio (linearised): with e_r a row's difference
    of sums less what its weight says it should be, sqrt(R / (R - 1) sum e_r²) / sum of weights. Rows of the same weight
    make it the deviation of their differences by the root of R. None for a single row.
    """
    R, weight = len(whole.sum_R), whole.weight_R.sum()
    apart_R = without.sum_R - whole.sum_R
    difference = apart_R.sum() / weight
    error_R = apart_R - difference * whole.weight_R
    spread = math.sqrt(R / (R - 1) * np.square(error_R).sum()) / weight if R > 1 else None
    return {
        "whole": float(whole.sum_R.sum() / weight),
        "without": float(without.sum_R.sum() / weight),
        "difference": float(difference),
        "standard_error": None if spread is None else float(spread),
        "rows": R,
        "tokens": int(whole.asked_R.sum()),
    }

"""The job of `python ablate.py STUDY`: train what is missing, and write the report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probes import study_report
from probes.ablation import Work, missing, opened, prepare, run
from probes.matching import Resolved
from probes.studies import Options, changed, find
from training.flags import parse
from training.lock import RunLock
from training.settings import ROOT, ConfigError


def ablate(name: str, flags: Sequence[str], command: str) -> Path | None:
    """Returns the report's path; None after a dry run, or where nothing is known yet."""
    study, title = find(name)
    options = parse(Options(), flags, program=f"python ablate.py {name}")
    study = changed(study, options)
    folder = options.folder or ROOT / "results" / title
    console = Console()
    cells = prepare(study)
    work = Work(study, title, cells, opened(folder / "study.jsonl"), folder, command, console)
    console.print(_table(work))
    if options.dry_run:
        return None
    with RunLock(folder):
        run(work, options.only)
    if not any(row["digest"] == resolved.digest for resolved in cells for row in work.ledger.rows):
        raise ConfigError("nothing of this study is known yet, so there is nothing to report")
    return study_report.write(study, title, cells, work.ledger.rows, folder)


def _table(work: Work) -> Table:
    """The cells: what they cost, how close they were matched, and how many of their arms are yet to be trained."""
    study = work.study
    out = Table(title=escape(study.about), title_justify="left", title_style="bold")
    out.add_column("cell")
    for head in ("parameters", "in tables", "state, bytes", "MFLOP a token", "matched", "arms", "to train"):
        out.add_column(head, justify="right")
    for resolved in work.cells:
        costs, arms = resolved.costs, len(study.arms(resolved.cell))
        out.add_row(
            escape(resolved.cell.name),
            *(f"{costs[what]:,.0f}" for what in ("parameters", "table_parameters", "state_bytes")),
            f"{costs['flops'] / 1e6:.2f}",
            matched(resolved),
            str(arms),
            str(len(missing(study, resolved, work.ledger))),
        )
    return out


def matched(resolved: Resolved) -> str:
    """What a cell was made equal in, and how close it came."""
    return ", ".join(
        f"{m.what} {m.off:+.1%}" + (f" ({m.field} {m.chosen})" if m.chosen is not None else "")
        for m in resolved.matched
    )

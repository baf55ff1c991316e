"""The job of `python ablate.py STUDY`: train what is missing, and write the report."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probes import study_report, workers
from probes.ablation import LEDGER, Work, missing, opened, prepare, run
from probes.matching import Resolved
from probes.studies import Options, changed, find
from training.flags import parse
from training.lock import RunLock
from training.settings import ROOT, ConfigError


def ablate(name: str, flags: Sequence[str], command: str) -> Path | None:
    """Returns the report's path; None after a dry run. ConfigError where nothing is known yet."""
    study, title = find(name)
    options = parse(Options(), flags, program=f"python ablate.py {name}")
    study = changed(study, options)
    folder = options.folder or ROOT / "results" / title
    cells = prepare(study)

    def opened_with(writable: bool) -> Work:
        ledger = opened(folder / LEDGER, writable=writable)
        console = Console(width=None if sys.stdout.isatty() else 120)  # a file has room for the table
        work = Work(study, title, cells, ledger, folder, f"{command}{_flags(options)}", console)
        work.console.print(_table(work))
        return work

    if options.dry_run:
        opened_with(writable=False)
        return None
    with RunLock(folder):
        work = opened_with(writable=True)
        if options.workers == 1:
            run(work, options.only)
        else:
            workers.run(work, options.only, options.workers, [name, *shlex.split(_flags(options))])
        if not any(row["digest"] == resolved.digest for resolved in cells for row in work.ledger.rows):
            raise ConfigError("nothing of this study is known yet, so there is nothing to report")
        return study_report.write(study, title, cells, work.ledger.rows, folder)


def _flags(options: Options) -> str:
    """What a command needs to make these arms again; which cells, each row says by itself."""
    given = [
        f"--{name} {value}" for name in ("seeds", "steps", "together") if (value := getattr(options, name)) is not None
    ]
    given += [f"--rates {' '.join(map(str, options.rates))}"] if options.rates else []
    return "".join(f" {flag}" for flag in given)


def _table(work: Work) -> Table:
    """The cells: what they cost, how close they were matched, and how many of their arms are yet to be trained."""
    study, cells = work.study, work.cells
    columns: dict[str, list[str]] = {
        "parameters": [f"{r.costs['parameters']:,.0f}" for r in cells],
        "in tables": [f"{r.costs['table_parameters']:,.0f}" for r in cells],
        "state, bytes": [f"{r.costs['state_bytes']:,.0f}" for r in cells],
        "MFLOP a token": [f"{r.costs['flops'] / 1e6:.2f}" for r in cells],
        "matched": [matched(r) for r in cells],
        "to train": [f"{len(missing(study, r, work.ledger))} of {len(study.arms(r.cell))}" for r in cells],
    }
    shown = {head: texts for head, texts in columns.items() if set(texts) - {"0", ""}}
    out = Table(title=escape(study.about), title_justify="left", title_style="bold")
    out.add_column("cell", no_wrap=True, overflow="fold")
    for head in shown:
        out.add_column(head, justify="right")
    for resolved, *texts in zip(cells, *shown.values(), strict=True):
        out.add_row(escape(resolved.cell.name), *texts)
    return out


def matched(resolved: Resolved) -> str:
    """What a cell was made equal in, and how close it came."""
    return ", ".join(
        f"{m.what} {m.off:+.1%}" + (f" ({m.field} {m.chosen})" if m.chosen is not None else "")
        for m in resolved.matched
    )

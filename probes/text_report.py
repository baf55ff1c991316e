"""A trained model asked in text, form by form and length by length; and the report of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models.lm import LanguageModel
from probes.matrix import both, cells, matrix, picture
from probes.options import OfRun
from probes.small_runs import Ledger
from probes.text import DEPTHS, FORMS, Reader, Source, ask
from training.data import DataError, Dataset
from training.experiment import Experiment

ABOUT = {
    "passkey": "a five-digit key planted in held-out text, asked at the end",
    "needle": "one of four assignments of seven digits planted in held-out text, asked at the end",
    "phonebook": "the number, seven digits, of one of as many people as fit",
    "copying": "the 12 letters that followed 12 others among random letters",
    "order": "which of two passages came first: the likelier of two letters, so chance is 1/2",
    "read_twice": "a passage read again: every token of the second reading",
}
TWICE = ", twice"


def run(
    ledger: Ledger,
    trained: tuple[LanguageModel, Experiment, Dataset],
    key: dict[str, Any],
    options: OfRun,
    lengths: Sequence[int],
    command: str,
    console: Console,
) -> None:
    """Asks what the ledger does not have. key: what names the model (run, step). command: kept with each row."""
    model, experiment, dataset = trained
    source, reader = Source(dataset), Reader(model)
    rows, twice = options.rows, options.twice
    for form in options.probes:
        for length in lengths:
            if ledger.has(**key, probe=form, length=length, rows=rows, twice=twice):
                continue
            try:
                with console.status(f"{form}, {length:,} tokens"):
                    row = ask(reader, source, form, length, rows=rows, batch=options.batch, twice=twice)
            except DataError as error:
                console.print(f"{form}, {length:,} tokens: left out: {error}")
                continue
            ledger.add(**key, trained_length=experiment.data.T, **row, command=command)
            console.print(said(row))


def said(row: dict[str, Any]) -> str:
    first = "" if row["first_nats"] is None else f", {row['first_nats'] - row['nats']:.2f} saved"
    return (
        f"{row['probe']}, {row['length']:,} tokens: {row['accuracy']:.1%} of tokens, {row['exact']:.1%} of answers, "
        f"{row['nats']:.2f} nats a token{first}; state {row['state_bytes']:,} bytes ({row['seconds']:.0f} s)"
    )


def write(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> Path:
    """report.md and its pictures; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = {(_form(row), row["length"]): row for row in rows}
    known = [*FORMS, *(form + TWICE for form in FORMS)]
    forms = [form for form in known if any(said == form for said, _ in latest)]
    lengths = sorted({length for _, length in latest})
    trained = rows[-1]["trained_length"]
    columns = [f"{length:,}" for length in lengths]
    panels = {"tokens said right": columns, "whole answers": columns}
    values = {
        form: {
            panel: cells([[latest.get((form, length), {}).get(key) for length in lengths]])
            for panel, key in zip(panels, ("accuracy", "exact"), strict=True)
        }
        for form in forms
    }
    both(matrix(f"{name}: recall by length, trained on {trained:,} tokens", panels, values), folder / "lengths")
    lines = [f"# What {name} recalls", "", picture("lengths", f"{name}: recall by length"), ""]
    lines += ["| asked | tokens | right | ± | whole answers | nats | state, bytes | working memory, bytes | s |"]
    lines += ["|---|" + "---:|" * 8]
    for form in forms:
        for length in lengths:
            if (row := latest.get((form, length))) is None:
                continue
            spread = "" if row["standard_error"] is None else f"{row['standard_error']:.3f}"
            lines.append(
                f"| {form} | {length:,} | {row['accuracy']:.3f} | {spread} | {row['exact']:.3f} | {row['nats']:.2f} "
                f"| {row['state_bytes']:,} | {row['temporary_bytes']:,} | {row['seconds']:.0f} |"
            )
    last = rows[-1]
    lines += ["", f"{last['rows']} rows a line, checkpoint of step {last['step']:,}.", ""]
    lines += [f"- `{form}`: {ABOUT[form]}." for form in FORMS if form in forms or form + TWICE in forms]
    if any(form.endswith(TWICE) for form in forms):
        lines += [f"- `{TWICE.strip(', ')}`: the prompt is read twice before the answer (JRT-prompt)."]
    if "read_twice" in forms:
        lines += [
            "",
            "| read twice, tokens | first reading | second reading | nats saved a token |",
            "|---:|---:|---:|---:|",
        ]
        for length in lengths:
            if (row := latest.get(("read_twice", length))) is not None:
                saved = row["first_nats"] - row["nats"]
                lines.append(f"| {length:,} | {row['first_accuracy']:.3f} | {row['accuracy']:.3f} | {saved:.2f} |")
    planted = [form for form in forms if form.removesuffix(TWICE) != "read_twice"]
    if planted:
        shares = [f"{(k + 0.5) / DEPTHS:.0%}" for k in range(DEPTHS)]
        by_length = {f"{length:,} tokens": shares for length in lengths}
        shown = {
            form: {
                f"{length:,} tokens": cells([_padded(latest.get((form, length), {}).get("by_depth", []))])
                for length in lengths
            }
            for form in planted
        }
        both(matrix(f"{name}: tokens said right, by where it was said", by_length, shown), folder / "depths")
        lines += ["", "By where in the document it was said (0% is the start):", ""]
        lines += [picture("depths", f"{name}: recall by depth"), ""]
    lines += ["", "```", *dict.fromkeys(row["command"] for row in rows), "```"]
    path = folder / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _form(row: dict[str, Any]) -> str:
    return row["probe"] + (TWICE if row["twice"] else "")


def _padded(values: Sequence[float]) -> list[float | None]:
    return [*values, *[None] * (DEPTHS - len(values))]

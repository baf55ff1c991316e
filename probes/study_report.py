"""The report of a study, as Markdown, HTML and pictures: made of its ledger alone, and the same when made again."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probes.blocks import Block, Code, Heading, Item, Items, Paragraph, Table, markdown
from probes.matching import Resolved
from probes.page import page
from probes.study import Study
from probes.study_numbers import (
    VERDICTS,
    Result,
    Row,
    Verdict,
    asked,
    at_bytes,
    goal,
    guessers,
    line,
    mean,
    once,
    ranked,
    results,
    slices,
    verdicts,
    worst_match,
)
from probes.study_pictures import PARTS, pictures, setting_part

COLUMNS = 8  # slices that the table has room for
QUANTITIES = {
    "parameters": "parameters",
    "table_parameters": "parameters in tables",
    "state_bytes": "bytes of state",
    "flops": "FLOPs a token",
}


def write(study: Study, title: str, cells: list[Resolved], rows: list[Row], folder: Path) -> Path:
    """report.md, report.html and their pictures, of the rows of a ledger; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    found = results(study, cells, rows)
    said = verdicts(study, found)
    blocks: list[Block] = [Heading(title, 1), Paragraph(study.about), Paragraph(summary(found, said))]
    if said:
        blocks += [Heading("Claims"), Items(tuple(map(_claim, said)))]
    blocks += [Heading("Results"), *_results(study, found)]
    if drawn := pictures(study, found, folder):
        blocks += [Heading("Pictures"), *drawn]
    if study.references:
        blocks += [Heading("Beside what is published"), _published(study, found)]
    if study.notes:
        paragraphs = [text for text in study.notes.split("\n\n") if text.strip()]
        blocks += [Heading("How to read this"), *map(Paragraph, paragraphs)]
    blocks += [Heading("How it was made"), *_made(found)]
    path = folder / "report.md"
    path.write_text(markdown(blocks))
    path.with_suffix(".html").write_text(page(blocks, folder))
    return path


def count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def summary(found: Sequence[Result], said: Sequence[Verdict]) -> str:
    """What was trained and what came out, as a paragraph of numbers."""
    trained, waiting = ranked(found), [result for result in found if not result.chosen]
    if not trained:
        return f"Nothing is trained yet: the study has {count(len(found), 'cell')}."
    rows = once(found)
    arms = sum({result.resolved.digest: result.arms for result in found}.values())
    trained_said = f"{count(len(trained), 'cell')} {'was' if len(trained) == 1 else 'were'} trained"
    lines = [f"{trained_said}, {len(rows):,} of {count(arms, 'arm')}: {_length(trained, rows)}."]
    if waiting:
        lines.append(f"{count(len(waiting), 'cell is', 'cells are')} not trained yet.")
    lines += _ends(trained)
    lines += _seeds(trained)
    if said:
        each = [(sum(v.said == word for v in said), word) for word in VERDICTS]
        told = ", ".join(f"{n} {word}" for n, word in each if n)
        lines.append(f"Of {count(len(said), 'claim')}: {told}.")
    if (worst := worst_match(found)) is not None:
        result, matched = worst
        kinds = listed([QUANTITIES[what] for what in dict.fromkeys(m.what for r in found for m in r.resolved.matched)])
        lines.append(
            f"Cells were matched in {kinds}; the largest miss is {abs(matched.off):.1%}"
            + (f" ({result.name}, {QUANTITIES[matched.what]})." if matched.off else ".")
        )
    lines.append(f"Training took {_time(sum(row['cpu_seconds'] for row in rows))}.")
    return " ".join(lines)


def _length(trained: Sequence[Result], rows: Sequence[Row]) -> str:
    """How long arms were trained."""
    steps = sorted({result.resolved.cell.experiment.train.steps for result in trained})
    tokens = sorted({row["tokens"] for row in rows})
    most = "at most " if any(row["goal"] is not None for row in rows) else ""
    size = _span(tokens)
    each = (
        f"{most}{_span(steps)} {'step' if steps == [1] else 'steps'} of {size} {'token' if tokens == [1] else 'tokens'}"
    )
    return f"{each} each, {count(sum(row['steps'] * row['tokens'] for row in rows), 'token')} in all"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _ends(trained: Sequence[Result]) -> list[str]:
    """The best and the last cell, of each group."""
    measure = trained[0].chosen[0]["measure"]
    groups = list(dict.fromkeys(result.group for result in trained))
    if len(groups) > 1:
        ends = []
        for group in groups:
            mine = [result for result in trained if result.group == group]
            last = f", and {mine[-1].name} is last with {mine[-1].test:.3f}" if len(mine) > 1 else ""
            ends.append(f"{mine[0].name} is first with {measure} {mine[0].test:.3f}{last}")
        return [f"Cells are ranked within each choice, of which there are {len(groups)}: {'; '.join(ends)}."]
    best, worst = trained[0], trained[-1]
    if best is worst:
        return [f"{best.name} has {measure} {best.test:.3f}."]
    return [
        f"The best cell is {best.name}, with {measure} {best.test:.3f}; the last is {worst.name}, with "
        f"{worst.test:.3f}: they are {abs(best.test - worst.test):.3f} apart."
    ]


def _seeds(trained: Sequence[Result]) -> list[str]:
    """What seeds do."""
    if max(len(result.chosen) for result in trained) < 2:
        return ["There is one seed of each setting, so nothing is known of the spread over seeds."]
    spreads = [result.spread for result in trained if len(result.chosen) > 1]
    if len(spreads) == 1:
        whose = "Its seeds" if len(trained) == 1 else "Seeds"
        return [f"{whose} are {spreads[0]:.3f} apart."]
    middle = f"{np.median(spreads):.3f} apart at the median of cells, and {max(spreads):.3f} at most"
    return [f"Seeds of a cell are {middle}."]


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} CPU {'second' if round(seconds) == 1 else 'seconds'}"
    return f"{seconds / 60:.0f} CPU minutes" if seconds < 7200 else f"{seconds / 3600:.1f} CPU hours"


def _claim(verdict: Verdict) -> Item:
    claim = verdict.claim
    lines = [f"{claim.says} ({claim.source})"]
    if verdict.why:
        lines.append(f"Why: {verdict.why.rstrip('.')}.")
    if verdict.differences:
        of = f" at {claim.slice}" if claim.slice else f" at {claim.at:,} bytes" if claim.at else ""
        low, high = min(verdict.differences), max(verdict.differences)
        seeds = count(len(verdict.differences), "seed")
        lines.append(
            f"{claim.more}{of}: {verdict.more:.3f}; {claim.less}{of}: {verdict.less:.3f}. In favour of the first: "
            f"{verdict.difference:+.3f} on average, {low:+.3f} to {high:+.3f} over {seeds}; "
            f"at least {claim.least:+.3f} counts."
        )
    elif not verdict.why:
        lines.append(f"It compares {claim.more} with {claim.less}.")
    return Item(verdict.said, tuple(lines))


def _results(study: Study, found: Sequence[Result]) -> list[Block]:
    trained = ranked(found)
    order = [*trained, *(result for result in found if not result.chosen)]
    measure = trained[0].chosen[0]["measure"] if trained else "result"
    names = slices(trained)
    shown = names if len(names) <= COLUMNS else []
    columns: dict[str, list[str]] = {"rank": [str(result.rank or "") for result in order]}
    columns[measure] = [spread(result.tests) if result.chosen else "not trained yet" for result in order]
    for name in shown:
        columns[name] = [_slice(result, name) for result in order]
    kept = ["rank", measure]
    for head, cells in _facts(order).items():
        columns[head] = cells
    same: list[str] = []
    for head, cells in list(columns.items()):
        values = {cell for cell in cells if cell}
        if head not in kept and (not values or (len(values) == 1 and len(order) > 1)):
            del columns[head]
            same += [f"{head} {value}" for value in values]
    rows = [(result.name, *(cells[r] for cells in columns.values())) for r, result in enumerate(order)]
    for who, bars in guessers(trained).items():
        mine = {name or measure: f"{bar:.3f}" for name, bar in bars.items()}
        rows.append((f"({who})", *(mine.get(head, "") for head in columns)))
    seeds = max((len(result.chosen) for result in trained), default=0)
    several = any(len(result.settings) > 1 for result in trained)
    caption = "Each cell at its best setting, which was chosen by validation rows; " if several else ""
    caption += "mean over seeds (least to most)." if seeds > 1 else "one seed."
    caption = caption[:1].upper() + caption[1:]
    blocks: list[Block] = [Table(caption, ("cell", *columns), tuple(rows))]
    if same:
        blocks.append(Paragraph(f"The same in all rows: {'; '.join(same)}."))
    if len(names) > COLUMNS:
        blocks.append(Paragraph(f"The {len(names)} slices are in a picture below."))
    return blocks


def _facts(order: Sequence[Result]) -> dict[str, list[str]]:
    """Columns of the table beside the measure: settings, costs, times."""
    inits = any(result.best[2] != 1 for result in order if result.best)
    decays = any(result.best[1] is not None for result in order if result.best)
    out: dict[str, list[str]] = {}
    for part, wanted in enumerate((True, decays, inits)):
        out[PARTS[part]] = [setting_part(r.best, part) if r.best and wanted else "" for r in order]
    for what, name in QUANTITIES.items():
        costs = [result.resolved.costs[what] for result in order]
        out[name] = [f"{cost:,.0f}" for cost in costs] if any(costs) else ["" for _ in order]
    lengths = [str(r.chosen[0]["length"]) if r.chosen else "" for r in order]
    out["tokens of the longest row"] = lengths
    out["matched"] = [
        "; ".join(
            f"{QUANTITIES[m.what]} {m.off:+.1%}" + ("" if m.chosen is None else f" ({m.field} {m.chosen:,})")
            for m in result.resolved.matched
        )
        for result in order
    ]
    goals = [goal(result) for result in order]
    out["steps to the goal"] = [
        "" if g is None else f"{g.steps:,.0f}" if g.reached == g.seeds else f"{g.reached} of {count(g.seeds, 'seed')}"
        for g in goals
    ]
    out["CPU seconds to the goal"] = [_seconds(g.seconds) if g and g.reached == g.seeds else "" for g in goals]
    out["CPU seconds in all"] = [
        _seconds(sum(row["cpu_seconds"] for row in result.rows)) if result.chosen else "" for result in order
    ]
    skipped = [sum(row["skipped"] for row in result.chosen) for result in order]
    out["skipped steps"] = [f"{n:,}" if any(skipped) and r.chosen else "" for n, r in zip(skipped, order, strict=True)]
    out["seeds"] = [str(len(result.chosen)) if result.chosen else "" for result in order]
    out["arms"] = [f"{len(r.rows)} of {r.arms}" if 0 < len(r.rows) < r.arms else "" for r in order]
    return out


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def spread(values: Sequence[float]) -> str:
    """A mean, and the least and the most where there are several."""
    middle = f"{np.mean(values):.3f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.3f}–{max(values):.3f})"


def _slice(result: Result, name: str) -> str:
    values = asked(result, name)
    return spread(values) if values else ""


def _published(study: Study, found: Sequence[Result]) -> Table:
    by_name = {result.name: result for result in found}
    measure = next((result.chosen[0]["measure"] for result in found if result.chosen), "result")
    columns: dict[str, list[str]] = {"published": [], "ours": [], "ours less published": []}
    columns |= {"bytes of state, published": [], "bytes of state, ours": []}
    for point in study.references:
        mine = by_name.get(point.name)
        ours = None if mine is None or not mine.chosen else mean(asked(mine, point.slice))
        size = f"{mine.resolved.costs['state_bytes']:,.0f}" if mine else ""
        if point.choice and (cells := line(found, point.choice)):
            ours = at_bytes(cells, point.state_bytes or 0, [mean(asked(result, point.slice)) for result in cells])
            size = f"{cells[0].resolved.costs['state_bytes']:,.0f} to {cells[-1].resolved.costs['state_bytes']:,.0f}"
        values = (
            f"{point.value:.3f}",
            "" if ours is None else f"{ours:.3f}",
            "" if ours is None else f"{ours - point.value:+.3f}",
            "" if point.state_bytes is None else f"{point.state_bytes:,}",
            size,
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    columns = {head: column for head, column in columns.items() if any(column)}
    rows = [(point.name, *(c[r] for c in columns.values())) for r, point in enumerate(study.references)]
    caption = f"Published values beside ours, {measure}."
    if any(point.choice for point in study.references):
        caption += " Ours is read between cells, at the published bytes; empty outside of ours."
    return Table(caption, ("name", *columns), tuple(rows))


def _made(found: Sequence[Result]) -> list[Block]:
    rows = once(found)
    if not rows:
        return [Paragraph("Nothing is trained yet.")]
    last = rows[-1]
    whole = last["command"].removesuffix(f" --only {shlex.quote(last['cell'])}")
    every = [r.chosen[0]["command"] if r.chosen else f"{whole} --only {shlex.quote(r.name)}" for r in found]
    versions = {name: sorted({row["versions"][name] for row in rows}) for name in last["versions"]}
    said = ", ".join(f"{name} {listed(numbers)}" for name, numbers in versions.items())
    devices = listed(sorted({row["device"] for row in rows}))
    return [
        Paragraph("This trains what is missing, and writes this report again:"),
        Code((whole,)),
        Code(tuple(dict.fromkeys(every)), "The command of each row"),
        Paragraph(f"Trained on {devices}, with {said}."),
    ]

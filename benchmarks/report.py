"""The rows of a benchmark, as a table on the terminal and as a Markdown file."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.pair import ROOT, TUNABLES


@dataclass(frozen=True)
class Row:
    section: str
    item: str
    result: str = ""  # what the goal speaks of
    goal: str = ""
    met: bool | None = None
    ours_ms: float | None = None
    peer: str = ""
    peer_ms: float | None = None
    temp_mb: float | None = None
    peer_temp_mb: float | None = None
    compile_s: float | None = None
    error: float | None = None  # largest relative difference that the accuracy gate saw
    note: str = ""

    def cells(self) -> list[str]:
        temp = "/".join(number(x) for x in (self.temp_mb, self.peer_temp_mb) if x is not None)
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return [
            self.item,
            self.peer,
            number(self.ours_ms),
            number(self.peer_ms),
            self.result,
            self.goal,
            met,
            temp,
            "" if self.compile_s is None else f"{self.compile_s:.1f}",
            "" if self.error is None else f"{self.error:.0e}",
            self.note,
        ]


COLUMNS = (
    "item", "peer", "ours ms", "peer ms", "result", "goal", "met", "temp MB (ours/peer)", "compile s", "error", "note",
)  # fmt: skip


METHOD = """\
One process, one pinned core and one thread a contestant; the clock is the CPU time of the process; rounds are
interleaved. Milliseconds are medians over rounds, ratios medians of the ratios within a round, exponents come from the
best of the rounds. Outputs and all gradients are compared before anything is timed (`error`: the largest relative
difference). Float32; B 2, T 2048, H 4, K = V = 64 unless the row says otherwise. `result` against a peer: how many
times as fast as the peer. Temporary memory is XLA's own account; `compile s` is CPU time to trace and compile, with no
cache."""


def number(x: float | None) -> str:
    """Three digits, without an exponent."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def at_least(value: float, goal: float | None, unit: str = "x") -> dict[str, Any]:
    """The fields of a Row whose goal is a lower bound, such as "this many times as fast as the peer"."""
    if goal is None:
        return {"result": f"{value:.2f}{unit}"}
    return {"result": f"{value:.2f}{unit}", "goal": f">= {goal:g}{unit}", "met": value >= goal}


def at_most(value: float, goal: float | None, unit: str = "x") -> dict[str, Any]:
    if goal is None:
        return {"result": f"{value:.2f}{unit}"}
    return {"result": f"{value:.2f}{unit}", "goal": f"<= {goal:g}{unit}", "met": value <= goal}


def sections(rows: list[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.section, []).append(row)
    return result


def show(rows: list[Row], console: Console) -> None:
    for title, members in sections(rows).items():
        table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False)
        used = _used(members)
        for i in used:
            table.add_column(COLUMNS[i], justify="left" if COLUMNS[i] in ("item", "peer", "note") else "right")
        for row in members:
            cells = row.cells()
            style = {True: "green", False: "red", None: ""}[row.met]
            table.add_row(*[f"[{style}]{cells[i]}[/]" if style and i in (4, 6) else cells[i] for i in used])
        console.print(table)
    console.print(verdict(rows))


def markdown(rows: list[Row], facts: dict[str, str], title: str = "CPU benchmark", method: str = METHOD) -> str:
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        method,
        "",
        f"**{verdict(rows)}**",
    ]
    for title, members in sections(rows).items():
        used = _used(members)
        lines += ["", f"## {title}", "", _line([COLUMNS[i] for i in used])]
        lines.append(_line(["---" if COLUMNS[i] in ("item", "peer", "note") else "---:" for i in used]))
        for row in members:
            cells = row.cells()
            lines.append(_line([cells[i] for i in used]))
    return "\n".join(lines) + "\n"


def verdict(rows: list[Row]) -> str:
    judged = [row for row in rows if row.met is not None]
    missed = [row.item for row in judged if not row.met]
    text = f"{len(judged) - len(missed)} of {len(judged)} goals met"
    return text + (f"; missed: {'; '.join(missed)}" if missed else "")


def facts(command: str, versions: dict[str, str], rounds: int, load: str, seconds: float) -> dict[str, str]:
    """What a reader needs to repeat or to doubt the figures."""
    packages = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": f"`{command}`",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "ours": ", ".join(f"{n} {v}" for n, v in packages.items()),
        "peers": ", ".join(f"{n} {v}" for n, v in sorted(versions.items())) or "none installed",
        "rounds": str(rounds),
        "allocator": f"GLIBC_TUNABLES={TUNABLES} for all contestants; transparent huge pages: {huge_pages()}",
        "load average": load,
        "took": f"{seconds:.0f} s",
    }


def door(
    about: str | None, rows: Callable[[int, int], list[Row]], name: str, title: str, method: str, rounds: int
) -> None:
    """The command line of benchmarks.NAME: measures rows(core, rounds) and writes results/NAME/bench.md."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    parser.add_argument("--core", type=int, default=0, help="the core that everything is pinned to (default 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / name / "bench.md")
    options = parser.parse_args()
    start, load = time.time(), f"{os.getloadavg()[0]:.1f}"
    found, console = rows(options.core, options.rounds), Console()
    show(found, console)
    command = f"python -m benchmarks.{name} --rounds {options.rounds}"
    known = facts(command, {}, options.rounds, load, time.time() - start)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(markdown(found, known, title, method))
    console.print(f"wrote {options.output}")


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "layers", "models", "training", "benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")


def machine() -> str:
    """The kind of machine, from what Linux says of its processor."""
    name, flags = platform.processor() or platform.machine(), set()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                name = value.strip()
            elif field.strip() == "flags":
                flags = set(value.split())
    kinds = [k for k in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if k in flags]
    return f"{name}, {os.cpu_count()} cores" + (f" ({', '.join(kinds)})" if kinds else "")


def huge_pages() -> str:
    """The kernel's setting; the tunable has no effect where it is "never"."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else "unknown"


def _used(rows: list[Row]) -> list[int]:
    cells = [row.cells() for row in rows]
    return [i for i in range(len(COLUMNS)) if i == 0 or any(c[i] for c in cells)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

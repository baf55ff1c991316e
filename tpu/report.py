"""Says on a terminal what `tpu.ahead` found out."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes as people say them: 1.50 GiB."""
    for unit in UNITS:
        if count < 1024 or unit == UNITS[-1]:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def fits(report: dict[str, Any]) -> str:
    """Whether the peak and the program itself are within what a device has, and by how much."""
    left = report["usable"] - report["memory"]["peak"] - report["memory"]["program"]
    if left < 0:
        return f"does not fit: {size(-left)} more than the {size(report['usable'])} of a device"
    return f"fits: {size(left)} of {size(report['usable'])} stay free"


def axes(report: dict[str, Any]) -> str:
    """The axes of the mesh that are more than one device."""
    return ", ".join(f"{axis} {count}" for axis, count in report["mesh"].items() if count > 1) or "of one"


def show(console: Console, report: dict[str, Any]) -> None:
    """report: as `tpu.ahead.compile_step` returns it, with what was asked."""
    table = Table("", "", show_header=False, title=escape(f"{report['config']} on {report['topology']}"))
    mesh = axes(report)
    slices = f", {report['slices']} slices" if report["slices"] > 1 else ""
    batch = report["batch"]
    parts = f" in {batch['accumulate']} parts" if batch["accumulate"] > 1 else ""
    table.add_row("devices", f"{report['devices']} {report['device_kind']}{slices}, mesh {mesh}")
    table.add_row("batch", f"{batch['B']} x {batch['T']} tokens{parts}")
    table.add_row("parameters", f"{report['parameters']:,}")
    for where, held in report["sharded"].items():
        table.add_row("", f"{where}: {held['parameters']:,} in {held['arrays']} arrays")
    table.add_section()
    for name, count in report["memory"].items():
        table.add_row(name, size(count))
    if "usable" in report:
        table.add_row("", fits(report))
    table.add_section()
    table.add_row("arithmetic", f"{report['flops'] / 1e12:,.3f} TFLOP a step and device, without recomputation")
    for kind, said in report["collectives"].items():
        if said["runs"]:
            across = f", {size(said['across_slices'])} of them across slices" if said["across_slices"] else ""
            table.add_row(
                kind,
                f"{said['runs']:,} a step ({said['instructions']} in the program), {size(said['bytes'])}{across}; "
                f"a device sends {size(said['sent'])}",
            )
    if not any(said["runs"] for said in report["collectives"].values()):
        table.add_row("collectives", "none")
    if "floor" in report:
        table.add_section()
        least = report["floor"]
        table.add_row("a step takes", f"at least {duration(least['seconds'])}, bound by {least['bound']}")
        bounds = ("compute", "memory", "interconnect")
        table.add_row("", ", ".join(f"{name} {duration(least[name])}" for name in bounds))
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
    if report["uncounted_loops"]:
        console.print(f"note: {report['uncounted_loops']} loops with collectives count once: their length is not known")
    if report["rematerialised"]:
        console.print(
            f"warning: {report['rematerialised']} times XLA gathers an array whole and cuts it again (involuntary full "
            "rematerialisation): the layout is not what it seems",
            markup=False,
        )
    console.print(f"compiled in {report['seconds']} s", highlight=False)

"""A page of reports of tpu.compile: python -m tpu.results results/aot > results/aot/README.md."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tpu.report import axes, duration, size

HEAD = """# Compiled for pods that were not there

By `tpu.compile`, from shapes alone, on CPUs; [tpu/README.md](../../tpu/README.md) says what the figures mean. No step
was run: a floor is what the vendor's figures allow at best, and no forecast. This page is made by
`python -m tpu.results results/aot`; the reports beside it are whole.

Before a step said where its activations and its weights in use lie (`layers/ops/place.py`), XLA summed activations
where gathering the weights of a layer does: at commit 8894d5a, by the commands below with `--mesh.layout fsdp`,
Lizard sent 223 GiB and took 399.8 ms at least, B'MOJO 513 GiB and 1,377.7 ms.
"""


def page(reports: list[dict[str, Any]]) -> str:
    """Markdown: a table of all reports, and the command of each."""
    lines = [
        HEAD,
        "| config | pod | mesh | parameters | peak of HBM | TFLOP of a device | it sends | floor | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        sent = sum(kind["sent"] for kind in report["collectives"].values())
        cells = [
            report["config"],
            pod(report),
            axes(report),
            f"{report['parameters']:,}",
            f"{size(report['memory']['peak'])} of {size(report['usable'])}",
            f"{report['flops'] / 1e12:,.2f}",
            size(sent),
            duration(report["floor"]["seconds"]),
            report["floor"]["bound"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\n```")
    for report in reports:
        slices = ["--slices", str(report["slices"])] if report["slices"] > 1 else []
        asked = [report["config"], "--topology", report["topology"], *slices, *report["flags"]]
        lines.append(f"python -m tpu.compile {shlex.join(asked)}")
    lines.append("```\n")
    versions = sorted({", ".join(f"{name} {of}" for name, of in report["versions"].items()) for report in reports})
    lines.append(f"With {'; '.join(versions)}.")
    return "\n".join(lines)


def pod(report: dict[str, Any]) -> str:
    """The topology, and how many slices of it."""
    return report["topology"] + (f" x {report['slices']}" if report["slices"] > 1 else "")


if __name__ == "__main__":
    print(page([json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))]))

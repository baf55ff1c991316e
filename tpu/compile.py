"""Compiles a training step for a TPU pod that is not there: python -m tpu.compile CONFIG --topology v5e:4x4."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import tyro

from tpu import topology as topologies
from training.door import enter, failed
from training.flags import parse
from training.settings import ConfigError, load, locate

USAGE = """usage: python -m tpu.compile CONFIG[@SIZE] [--topology CHIP:SHAPE] [--slices N] [--json FILE] [--field value]

Compiles the very step that train.py runs, on this machine's CPUs, for chips that are elsewhere, and says what it takes:
memory, collectives, the least time of a step. It reads no data and makes no parameters. It takes minutes for a large
model. --model.scan-layers always makes that time independent of depth.

  --topology   v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x2, tpu7x:2x2x1 and so on; without it the pod that the config states
  --slices     so many of it, joined by a network (multislice)
  --json       also write the report to a file
  --field      any field of the config, as train.py has it: --mesh.fsdp -1 --mesh.data 1 --data.B 64

Exit status: 0; 1 where it does not fit, or where XLA gathers an array whole that the layout splits; 2 for what cannot
be compiled at all. tpu/README.md has a section on it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled, and for what.

    topology: a chip and a shape, such as v5e:4x4; empty for the config's pod.
    slices: how many of it.
    json: a file for the report; None for none.
    """

    experiment: Annotated[Any, tyro.conf.arg(name="")]
    topology: str = ""
    slices: int = 1
    json: Path | None = None


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        return compile_for(arguments)
    except ConfigError as error:
        return failed(error)
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}")


def compile_for(arguments: list[str]) -> int:
    """Compiles, and reports. Raises ConfigError, in one line, for what cannot be."""
    name, *rest = arguments
    if name.startswith("-"):
        raise ConfigError(f"the first argument is a config, not {name!r}: see python -m tpu.compile --help")
    os.environ.update(topologies.ENVIRONMENT)  # before JAX is imported
    plain, _, size = (name, "", "") if Path(name).exists() else name.partition("@")
    experiment = load(locate(plain), size)
    options = parse(Options(experiment), rest, program=f"python -m tpu.compile {name}")
    if not (asked_for := options.topology or options.experiment.pod):
        raise ConfigError("topology is missing: this config states no pod; give --topology, such as v5e:4x4")
    asked = topologies.read(asked_for, options.slices)
    devices = topologies.devices(asked)

    from rich.console import Console

    from tpu.ahead import DoesNotFit, compile_step
    from tpu.report import fits, show

    try:
        found = compile_step(options.experiment, devices, asked.chip)
    except DoesNotFit as error:
        return failed(f"{name} on {asked.name}: {error}", 1)
    report = {"config": name, "topology": asked.name, "slices": asked.slices, "flags": _flags(rest), **found}
    show(Console(soft_wrap=True), report)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(report["rematerialised"] > 0 or fits(report).startswith("does not"))


def _flags(arguments: list[str]) -> list[str]:
    """The flags of the config: those that say what is compiled, and not where to or where the report goes."""
    kept, skip = [], False
    for argument in arguments:
        ours = argument.split("=")[0] in ("--topology", "--slices", "--json")
        if not ours and not skip:
            kept.append(argument)
        skip = ours and "=" not in argument
    return kept


if __name__ == "__main__":
    enter(main, "")

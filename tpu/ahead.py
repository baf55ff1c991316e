"""Compiles a training step for a mesh of devices, from shapes alone, and says what it takes."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax

from tpu import collectives, topology
from tpu.capture import standard_error
from tpu.chips import Chip
from tpu.floor import floor
from training.experiment import Experiment
from training.layout import build_layout
from training.program import build_program
from training.settings import ConfigError
from training.summary import flops_per_token, parameter_count

REMATERIALISED = "nvoluntary full rematerialization"  # XLA's words for what it gathers whole and then cuts again
GIB = 1 << 30
_SIZE = r"([\d.]+[KMGT]?)"


class DoesNotFit(Exception):
    """A step that needs more memory than a device has: one line with both."""


def compile_step(experiment: Experiment, devices: list[Any], chip: Chip | None) -> dict[str, Any]:
    """What `tpu.report` shows, as JSON has it.

    devices: in the mesh's order. chip: of which they are; None for devices of which nothing is known, such as CPUs.
    Raises ConfigError for what cannot be laid out, DoesNotFit for what does not fit a device.
    """
    began = time.perf_counter()
    platform = devices[0].platform
    with tracing_for(platform):
        try:
            parts = experiment.train.accumulate
            layout = build_layout(experiment.mesh, experiment.data.B, experiment.data.T, devices, parts=parts)
            data = experiment.data.outline(experiment.model.W)
            program = build_program(experiment, data, layout)
            flops = flops_per_token(experiment, program.structure, data.labelled, data.prefix > 0)
        except ValueError as error:
            if "\n" in str(error):
                raise
            raise ConfigError(str(error)) from error
        lowered = program.step.lower(program.state, program.batch)
    with standard_error() as said:
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if line := out_of_memory(str(error)):
                raise DoesNotFit(line) from error
            raise
    specs, mesh = program.structure.specs, layout.mesh
    used = list(mesh.devices.flat)
    account = collectives.read(compiled.as_text(), [topology.slice_of(device) for device in used])
    memory = memory_of(compiled)
    flops *= experiment.data.T * experiment.data.B / len(used)
    report = {
        "devices": len(used),
        "device_kind": used[0].device_kind,
        "mesh": dict(mesh.shape),
        "parameters": parameter_count(specs),
        "sharded": layout.sharded(specs),
        "notes": layout.report(specs),
        "batch": {"B": experiment.data.B, "T": experiment.data.T, "accumulate": experiment.train.accumulate},
        "memory": memory,
        "flops": flops,
        "collectives": account.by_kind(),
        "uncounted_loops": account.uncounted,
        "rematerialised": said.text.count(REMATERIALISED),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": _versions(),
    }
    if chip is not None:
        within = sum(c.times * c.sent for c in account.collectives if not c.across)
        least = floor(chip, flops=flops, moved=memory["arguments"] + memory["outputs"], sent=within)
        report["floor"] = {**least._asdict(), "seconds": least.seconds, "bound": least.bound}
        report["usable"] = round(chip.usable * GIB)
    return report


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a device. aliased: outputs that lie where arguments lay, since the state is donated. temporaries: also
    those in a TPU core's own memory. peak: of HBM, at any time, the program aside."""
    said = compiled.memory_analysis()
    parts = {
        "arguments": said.argument_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "aliased": said.alias_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "program": said.generated_code_size_in_bytes,
    }
    whole = sum(parts.values()) - 2 * parts["aliased"]
    return {**parts, "peak": getattr(said, "peak_memory_in_bytes", 0) or whole}


def out_of_memory(message: str) -> str | None:
    """One line of what libtpu says of a program that is too large; None for other messages."""
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm(?:\. Exceeds hbm capacity by {_SIZE})?", message)
    if used:
        over = f", {used[3]} too much" if used[3] else ""
        return f"it does not fit: a device would need {used[1]} of HBM and has {used[2]}{over}"
    total = re.search(rf"memory required for .*?\({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    if total:
        return f"it does not fit: a device would need {total[1]} of HBM and has {total[2]}"
    return None


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Code that asks which backend it is traced for, to choose a schedule, hears that of the devices, and not that of
    this machine, which only compiles."""
    asked = jax.default_backend
    if platform == asked():
        yield
        return
    jax.default_backend = lambda: platform  # type: ignore[assignment]
    jax.clear_caches()  # functions that were traced for another backend
    try:
        yield
    finally:
        jax.default_backend = asked
        jax.clear_caches()


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

"""Pods that are not there: devices that a program can be compiled for, and not run on, by libtpu alone."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from tpu.capture import standard_error
from tpu.chips import CHIPS, FLAT, Chip
from training.settings import ConfigError

# libtpu asks a server of Google's cloud what machine it is on, and lets one process load it at a time. Neither matters
# where no chip is touched. JAX itself shall not look for chips either.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",  # warnings, which tpu.capture reads; else they go to a file
}


class Topology(NamedTuple):
    """Slices of chips. shape: of one slice, in chips. slices: how many."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def read(name: str, slices: int = 1) -> Topology:
    """What v5e:4x4 says. Raises ConfigError, in a line, for what is not sold."""
    match = re.fullmatch(r"([a-z0-9]+):([0-9]+(?:x[0-9]+)+)", name)
    if match is None or match[1] not in CHIPS:
        raise ConfigError(f"topology is {name!r}: give a chip of {', '.join(CHIPS)} and a shape, such as v5e:4x4")
    kind, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    if CHIPS[kind].dimensions == 2 and match[2] not in FLAT.values():
        raise ConfigError(f"topology is {name!r}: {kind} comes in {', '.join(FLAT.values())}")
    if CHIPS[kind].dimensions == 3 and not _cube(shape):
        raise ConfigError(
            f"topology is {name!r}: {kind} comes in 2x2x1, 2x2x2, 2x2x4, 2x4x4, and three multiples of 4 that do not "
            "fall, such as 4x4x8"
        )
    if slices < 1:
        raise ConfigError(f"slices is {slices}: it must be at least 1")
    return Topology(name, kind, shape, slices)


def _cube(shape: tuple[int, ...]) -> bool:
    if shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)):
        return True
    return len(shape) == 3 and all(size % 4 == 0 and size for size in shape) and list(shape) == sorted(shape)


def devices(topology: Topology) -> list[Any]:
    """Its devices, in the order in which train.py would lay its mesh over them. Raises ConfigError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu is missing: pip install engrax's tpu extra (make env ACCELERATOR=tpu); it needs no TPU here"
        )
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    if topology.shape in ((1, 1), (2, 4)):  # of one host, which is not of four chips
        options["chips_per_host_bounds"] = (*topology.shape, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        with standard_error():  # libtpu wonders what machine it is on
            found = topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except Exception as error:  # of a kind that is JAX's own
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology is {topology.name!r}: libtpu knows none such ({reason})") from error
    return sorted(found, key=lambda device: device.process_index)


def slice_of(device: Any) -> int:
    """Which slice a device is in; 0 for devices that know no slices."""
    return getattr(device, "slice_index", None) or 0

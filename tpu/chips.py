"""Cloud TPU types by name: how many chips, on how many hosts, and what Kubernetes and the VM images call them."""

import dataclasses
import re

from training.settings import ConfigError

# Chips to the shape that they are wired in: a square grid, or a cube.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CHIPS_OF_A_HOST = 4  # in a slice of several hosts, whatever the generation


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the types of one generation share.

    cores: what the number in a type's name counts, for each chip: 2 where it counts TensorCores, 1 where chips.
    largest: chips of the largest type that is one host.
    topologies: the shape for each number of chips.
    devices: that JAX sees of a chip.
    node: the value of GKE's label gke-tpu-accelerator; "" where we have no pool to offer.
    runtime: the image of a TPU VM.
    """

    cores: int
    largest: int
    topologies: dict[int, str]
    node: str
    runtime: str
    devices: int = 1


GENERATIONS = {
    "v6e": Generation(1, 8, FLAT, "tpu-v6e-slice", "v2-alpha-tpuv6e"),
    "v5p": Generation(2, 4, CUBE, "tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v5litepod": Generation(1, 8, FLAT, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v4": Generation(2, 4, CUBE, "tpu-v4-podslice", "tpu-ubuntu2204-base"),
    "v3": Generation(2, 4, {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}, "", "tpu-ubuntu2204-base", devices=2),
    "v2": Generation(2, 4, {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}, "", "tpu-ubuntu2204-base", devices=2),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU type such as v5litepod-16.

    chips: in all. hosts: machines that hold them; a worker each. topology: the chips' shape, such as 4x4.
    """

    name: str
    generation: Generation
    chips: int
    hosts: int
    topology: str

    @property
    def chips_of_a_host(self) -> int:
        return self.chips // self.hosts

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices


def read(name: str) -> Slice:
    """The slice that a type's name says. ConfigError, in a line, for a name that no type has."""
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", name)
    if match is None or match[1] not in GENERATIONS:
        hint = "v5e is written v5litepod: " if re.match("v5e|v5lite", name) else ""
        raise ConfigError(
            f"accelerator is {name!r}: {hint}give a TPU type such as v5litepod-8, v6e-8, v5p-8, v4-8, v3-8 or v2-8"
        )
    generation = GENERATIONS[match[1]]
    sizes = {chips * generation.cores: chips for chips in generation.topologies}
    if int(match[2]) not in sizes:
        raise ConfigError(f"accelerator is {name!r}: {match[1]} comes in {', '.join(map(str, sizes))}")
    chips = sizes[int(match[2])]
    hosts = 1 if chips <= generation.largest else chips // CHIPS_OF_A_HOST
    return Slice(name, generation, chips, hosts, generation.topologies[chips])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most, by its vendor, and how libtpu names it.

    flops: dense bfloat16 operations a second. memory: bytes a second, of HBM. interconnect: bytes a second that a chip
    sends to its neighbours, over all of its links: half of what is called bidirectional.
    usable: GiB of HBM that libtpu gives to a program, of one device.
    dimensions: of its topologies: a square grid, or a cube.
    devices: that JAX sees of a chip; each has its share of all above but `usable`.
    options: of libtpu, for one device where a chip can be one.
    """

    flops: float
    memory: float
    interconnect: float
    usable: float
    dimensions: int
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()


# Google's pages on the architecture of each generation (cloud.google.com/tpu/docs/v5e and so on), as of 2026. The links
# of v4, six of 50 GB/s, are from its paper (arXiv 2304.01433). What is usable was asked of libtpu 0.0.42.1.
CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9, 30.75, 3, options=(("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 200e9, 15.75, 2),
    "v5p": Chip(459e12, 2765e9, 600e9, 95.74, 3),
    "v6e": Chip(918e12, 1640e9, 400e9, 31.25, 2),
    "tpu7x": Chip(2307e12, 7380e9, 600e9, 94.75, 3, devices=2),
}

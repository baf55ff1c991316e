"""The least time that a step can take, by what a chip can do at most. A step of real life takes longer."""

from typing import NamedTuple

from tpu.chips import Chip


class Floor(NamedTuple):
    """Seconds a step: of arithmetic at the peak, of reading what comes in and writing what goes out once, and of
    sending what collectives have to send over all links at once."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """As if the three went on at the same time, entirely."""
        return max(self)

    @property
    def bound(self) -> str:
        """The longest of the three, by name."""
        return max(zip(self, self._fields, strict=True))[1]


def floor(chip: Chip, *, flops: float, moved: float, sent: float) -> Floor:
    """flops, moved, sent: of a step and a device. sent: without what goes from slice to slice, over a network of which
    nothing is said here."""
    share = 1 / chip.devices
    return Floor(flops / (chip.flops * share), moved / (chip.memory * share), sent / (chip.interconnect * share))

"""From letters to devices: one rule table lays out parameters, optimiser state and batches alike."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layers.ops.tables import Spread
from models.parameters import Spec
from training import processes
from training.data import Batch
from training.experiment import Mesh

RULES = {  # the first letter of a parameter that has a rule and divides takes the mesh axis; each axis is taken once
    "replicated": {},
    "fsdp": {"D": "data"},
    "tensor": {"H": "model", "G": "model", "F": "model", "W": "model"},
    "fsdp+tensor": {"H": "model", "G": "model", "F": "model", "W": "model", "D": "data"},
}
BATCH = "data"  # the axis of the batch's rows
HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Layout:
    """host: tables that are looked up, and what an optimiser has for their rows, lie in the host's memory."""

    mesh: jax.sharding.Mesh
    rules: dict[str, str]
    host: bool = False

    def rows(self, spec: Spec) -> tuple[str, ...]:
        """The mesh axes that share a table's rows: all that the rules name, as far as they divide."""
        for axes in (self._named, self._named[1:]):
            if spec.shape[-2] % math.prod(self.mesh.shape[a] for a in axes) == 0:
                return axes
        return ()

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(a for a in ("data", "model") if a in self.rules.values() and self.mesh.shape[a] > 1)

    def spread(self, specs: dict[str, Spec]) -> dict[str, Spread]:
        """Where the rows of tables are, if not all on each device. A look-up has to know, lest the partitioner gathers
        what is split over the axis of the batch, or sends rows of which only a sum is wanted."""
        if self.host:
            return {name: Spread(self.mesh, (), BATCH, host=True) for name, spec in specs.items() if spec.table}
        rows = {name: self.rows(spec) for name, spec in specs.items() if spec.table}
        return {name: Spread(self.mesh, axes, BATCH) for name, axes in rows.items() if axes}

    def spec(self, spec: Spec) -> PartitionSpec:
        if spec.table:
            return PartitionSpec(*[None] * (len(spec.shape) - 2), self.rows(spec) or None, None)
        taken: set[str] = set()
        parts: list[str | None] = []
        for letter, size in zip(spec.axes, spec.shape, strict=True):
            axis = self.rules.get(letter)
            if axis is None or axis in taken or self.mesh.shape[axis] == 1 or size % self.mesh.shape[axis]:
                parts.append(None)
            else:
                taken.add(axis)
                parts.append(axis)
        return PartitionSpec(*parts)

    def _place(self, spec: Spec, axes: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, axes, memory_kind=HOST if spec.table and self.host else None)

    def params(self, specs: dict[str, Spec]) -> dict[str, NamedSharding]:
        return {name: self._place(spec, self.spec(spec)) for name, spec in specs.items()}

    def like(self, tree: Any, specs: dict[str, Spec]) -> Any:
        """Shardings for a tree of arrays that mirror parameters (moments, averages): found by their name and shape, or,
        of what a table has for each of its rows, by that without its last axis."""

        def place(path: Any, leaf: Any) -> NamedSharding:
            for key in reversed(path):
                spec = specs.get(getattr(key, "key", getattr(key, "name", "")))
                if spec is not None and spec.shape == tuple(leaf.shape):
                    return self._place(spec, self.spec(spec))
                if spec is not None and spec.table and spec.shape[:-1] == tuple(leaf.shape):
                    return self._place(spec, PartitionSpec(*self.spec(spec)[:-1]))
            return self.replicated

        return jax.tree_util.tree_map_with_path(place, tree)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The batch's rows over `data`."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH))

    def share(self, B: int) -> slice | None:
        """The rows of a batch of B that this process makes: all those on its devices. None for one process: all."""
        if processes.count() == 1:
            return None
        rows = [index[0].indices(B) for index in self.batch.addressable_devices_indices_map((B,)).values() if index]
        return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))

    def feed(self, B: int) -> Callable[[Batch], Any]:
        """From this process's share of a batch to the batch, as arrays over all processes. Of one process: as it is."""
        share = self.share(B)
        if share is None:
            return lambda batch: batch

        def place(part: np.ndarray) -> jax.Array:
            def rows(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(B)
                return part[start - share.start : stop - share.start]

            return jax.make_array_from_callback((B, *part.shape[1:]), self.batch, rows)

        return lambda batch: jax.tree.map(place, batch)

    def report(self, specs: dict[str, Spec]) -> list[str]:
        """What stays whole although a rule names one of its letters, and why."""
        lines = []
        for name, spec in specs.items():
            ruled = [a for a in spec.axes if a in self.rules and self.mesh.shape[self.rules[a]] > 1]
            if spec.table and self._named and not self.rows(spec):
                lines.append(f"{name} is replicated: W = {spec.shape[-2]} does not divide over {self._named[-1]}")
            elif not spec.table and ruled and not any(self.spec(spec)):
                sizes = ", ".join(f"{a} = {spec.shape[spec.axes.index(a)]}" for a in ruled)
                lines.append(f"{name} is replicated: {sizes} does not divide over {self.rules[ruled[0]]}")
        return lines


def build_layout(config: Mesh, B: int, devices: list[Any] | None = None) -> Layout:
    """The mesh of a config over the devices at hand. Raises ValueError, with the fix, where sizes do not divide."""
    if devices is None:  # those of a process side by side, so that its rows are
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    sizes = {"data": config.data, "model": config.model}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError("mesh.data and mesh.model are both -1: fix one of them")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if any(size < 1 and size != -1 for size in sizes.values()) or len(devices) % fixed:
        said = " and ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        fit = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise ValueError(f"{said} do not fit {len(devices)} devices: their product (without a -1) must be one of {fit}")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if B % sizes["data"]:
        raise ValueError(f"data.B is {B}, which does not divide over mesh.data = {sizes['data']}: choose a multiple")
    count = sizes["data"] * sizes["model"]
    if left := sorted({d.process_index for d in devices} - {d.process_index for d in devices[:count]}):
        said = " and ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
        raise ValueError(f"{said} leave process {left[0]} without a device: make their product {len(devices)}")
    grid = np.array(devices[:count]).reshape(sizes["data"], sizes["model"])
    if config.tables == "host" and count > 1:
        raise ValueError(f"mesh.tables is 'host', for a mesh of one device, and this has {count}: set mesh.data to 1")
    if config.tables == "host" and HOST not in (known := [m.kind for m in devices[0].addressable_memories()]):
        raise ValueError(f"mesh.tables is 'host', but this device knows no {HOST} memory, only {', '.join(known)}")
    return Layout(jax.sharding.Mesh(grid, ("data", "model")), RULES[config.layout], config.tables == "host")

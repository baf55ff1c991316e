"""From letters to devices: one rule table lays out parameters, optimiser state and batches alike."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layers.ops.place import AXES, BATCH, FSDP, MODEL, RULES, SEQUENCE, placed
from layers.ops.tables import Spread
from models.parameters import Spec
from training import processes
from training.data import Batch
from training.experiment import Mesh

HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Layout:
    """host: tables that are looked up, and what an optimiser has for their rows, lie in the host's memory."""

    mesh: jax.sharding.Mesh
    host: bool = False

    @property
    def said(self) -> str:
        """Sizes of the axes that are more than one device."""
        return ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "of one"

    def rows(self, spec: Spec) -> tuple[str, ...]:
        """The mesh axes that share a table's rows: `fsdp` and `model`, as far as they divide."""
        for axes in (self._named, self._named[1:]):
            if spec.shape[-2] % math.prod(self.mesh.shape[a] for a in axes) == 0:
                return axes
        return ()

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(a for a in (FSDP, MODEL) if self.mesh.shape[a] > 1)

    def spread(self, specs: dict[str, Spec]) -> dict[str, Spread]:
        """Where the rows of tables are, if not all on each device. A look-up has to know, lest the partitioner gathers
        what is split over the axis of the batch, or sends rows of which only a sum is wanted."""
        if self.host:
            return {name: Spread(self.mesh, (), host=True) for name, spec in specs.items() if spec.table}
        rows = {name: self.rows(spec) for name, spec in specs.items() if spec.table}
        return {name: Spread(self.mesh, axes) for name, axes in rows.items() if axes}

    def spec(self, spec: Spec) -> PartitionSpec:
        if spec.table:
            return PartitionSpec(*[None] * (len(spec.shape) - 2), self.rows(spec) or None, None)
        return placed(spec.axes, spec.shape, dict(self.mesh.shape), kept=True)

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
        """The batch's rows over `data` and `fsdp`, their tokens over `sequence`."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH, SEQUENCE))

    @property
    def batch_axes(self) -> tuple[str, str]:
        """The axes of more than one device that its rows and its tokens lie over, in words."""
        rows, tokens = ([a for a in axes if self.mesh.shape[a] > 1] for axes in (BATCH, (SEQUENCE,)))
        return " and ".join(rows), " and ".join(tokens)

    def share(self, B: int) -> slice | None:
        """The rows of a batch of B that this process makes: all those on its devices. None for one process: all."""
        if processes.count() == 1:
            return None
        places = NamedSharding(self.mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((B,))
        rows = [index[0].indices(B) for index in places.values() if index]
        return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))

    def feed(self, B: int) -> Callable[[Batch], Any]:
        """From this process's share of a batch to the batch, as arrays over all processes. Of one process: as it is."""
        share = self.share(B)
        if share is None:
            return lambda batch: batch

        def place(part: np.ndarray) -> jax.Array:
            def piece(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(B)
                return part[start - share.start : stop - share.start, index[1]]

            return jax.make_array_from_callback((B, *part.shape[1:]), self.batch, piece)

        return lambda batch: jax.tree.map(place, batch)

    def sharded(self, specs: dict[str, Spec]) -> dict[str, dict[str, int]]:
        """Parameters by the mesh axes that their dimensions lie over, such as "D over fsdp"; most first."""
        found: dict[str, dict[str, int]] = {}
        for spec in specs.values():
            over = [
                f"{letter} over {axis if isinstance(axis, str) else ' and '.join(axis)}"
                for letter, axis in zip(spec.axes, self.spec(spec), strict=False)
                if axis
            ]
            entry = found.setdefault(", ".join(sorted(over)) or "whole on every device", {"arrays": 0, "parameters": 0})
            entry["arrays"] += 1
            entry["parameters"] += math.prod(spec.shape)
        return dict(sorted(found.items(), key=lambda item: -item[1]["parameters"]))

    def report(self, specs: dict[str, Spec]) -> list[str]:
        """What stays whole along an axis of the mesh although a rule names one of its letters, and what to do: a line
        for all arrays with the same reason, those of most parameters first."""
        found: dict[tuple[str, tuple[str, ...]], dict[str, int]] = {}
        for name, spec in specs.items():
            for reason in self._left(spec):
                found.setdefault(reason, {})[name] = math.prod(spec.shape)
        lines = []
        for (sizes, axes), arrays in sorted(found.items(), key=lambda item: -sum(item[1].values())):
            over = " x ".join(f"mesh.{axis}" for axis in axes)
            count = math.prod(self.mesh.shape[axis] for axis in axes)
            largest = max(arrays, key=lambda name: arrays[name])
            some = f"{largest} lies" if len(arrays) == 1 else f"{len(arrays)} arrays such as {largest} lie"
            lines.append(
                f"{some} whole over {over}, {sum(arrays.values()):,} parameters: {sizes} does not divide over {count} "
                f"devices; choose a multiple of {count}, or another {over}"
            )
        return lines

    def _left(self, spec: Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(sizes of the letters that the rules name, the axes of the mesh that divide none of them)"""
        if spec.table:
            if self.rows(spec) != self._named:
                yield f"W = {spec.shape[-2]}", self._named
            return
        taken = set(self.spec(spec))
        for axis in AXES:
            ruled = [f"{a} = {n}" for a, n in zip(spec.axes, spec.shape, strict=True) if axis in RULES.get(a, ())]
            if ruled and self.mesh.shape[axis] > 1 and axis not in taken:
                yield " or ".join(ruled), (axis,)

    def stream(self, B: int, T: int, *widths: int) -> tuple[int, ...]:
        """What a device holds of the residual stream, [B, T, *widths]."""
        shape = (B, T, *widths)
        return NamedSharding(self.mesh, placed("BT", shape, dict(self.mesh.shape))).shard_shape(shape)


def build_layout(config: Mesh, B: int, T: int, devices: list[Any] | None = None, *, parts: int = 1) -> Layout:
    """The mesh of a config over the devices at hand, for batches [B, T] taken in parts (train.accumulate).

    Raises ValueError, with the fix, where sizes do not divide.
    """
    if devices is None:  # those of a process side by side, so that its rows are
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    sizes = axis_sizes(config, B, T, [device.process_index for device in devices], parts)
    grid = np.array(devices[: math.prod(sizes.values())]).reshape(list(sizes.values()))
    if config.tables == "host" and HOST not in (known := [m.kind for m in devices[0].addressable_memories()]):
        raise ValueError(f"mesh.tables is 'host', but this device knows no {HOST} memory, only {', '.join(known)}")
    return Layout(jax.sharding.Mesh(grid, AXES), config.tables == "host")


def axis_sizes(config: Mesh, B: int, T: int, owners: Sequence[int], parts: int = 1) -> dict[str, int]:
    """Devices along each axis of a config's mesh, for batches [B, T] taken in parts.

    owners: of each device its process, in order.

    Raises ValueError, with the fix, where sizes do not divide.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"{' and '.join(f'mesh.{axis}' for axis in free)} are both -1: fix one of them")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    said = " and ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items() if size != 1) or "mesh.data = 1"
    if any(size < 1 and size != -1 for size in sizes.values()) or len(owners) % fixed:
        fit = ", ".join(str(n) for n in range(1, len(owners) + 1) if len(owners) % n == 0)
        raise ValueError(f"{said} do not fit {len(owners)} devices: their product (without a -1) must be one of {fit}")
    if free:
        sizes[free[0]] = len(owners) // fixed
    if B % (rows := parts * math.prod(sizes[axis] for axis in BATCH)):
        over = [f"mesh.{axis}" for axis in BATCH if sizes[axis] > 1]
        named = " x ".join(["train.accumulate"] * (parts > 1) + over)
        multiple = f"choose a multiple, such as {-(-B // rows) * rows}"
        raise ValueError(f"data.B is {B}, which does not divide over {named} = {rows}: {multiple}")
    if T % sizes[SEQUENCE]:
        raise ValueError(
            f"data.T is {T}, which does not divide over mesh.sequence = {sizes[SEQUENCE]}: choose a multiple"
        )
    count = math.prod(sizes.values())
    if left := sorted(set(owners) - set(owners[:count])):
        raise ValueError(f"{said} leave process {left[0]} without a device: make their product {len(owners)}")
    if config.tables == "host" and count > 1:
        raise ValueError(f"mesh.tables is 'host', for a mesh of one device, and this has {count}: set mesh.data to 1")
    return sizes

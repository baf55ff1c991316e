"""Where arrays lie on a mesh: the one rule table from letters (layers/layer.py) to the axes of a mesh.

Within `on(mesh)` a model says of the residual stream and of each weight that it uses where that lies; XLA's partitioner
would otherwise guess it from where the weights are kept, and may send activations where weights are smaller. Without a
mesh, as in generation and in tests of layers, nothing is said.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import jax
from jax import Array
from jax.sharding import PartitionSpec

DATA, FSDP, SEQUENCE, MODEL = AXES = ("data", "fsdp", "sequence", "model")
BATCH = (DATA, FSDP)  # the axes of a batch's rows
RULES = {
    "B": BATCH,
    "T": (SEQUENCE,),
    "H": (MODEL,),
    "G": (MODEL,),
    "F": (MODEL,),
    "W": (MODEL,),
    "D": (FSDP,),  # of a parameter and what an optimiser has for it, and only where they are kept: in use D is whole
}


def on(mesh: jax.sharding.Mesh) -> AbstractContextManager:
    """What is traced within is told where it lies on this mesh; of one device there is nothing to tell."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else nullcontext()


def placed(letters: str, shape: tuple[int, ...], mesh: dict[str, int], kept: bool = False) -> PartitionSpec:
    """The axes of a mesh of such sizes, by name, for each letter: those that divide it, each axis taken once.

    kept: of a parameter where it is kept, not used.
    """
    taken: set[str] = set()
    parts: list[tuple[str, ...] | str | None] = []
    for letter, size in zip(letters, shape, strict=False):
        axes = RULES.get(letter, ()) if kept or letter != "D" else ()
        axes = tuple(a for a in axes if mesh.get(a, 1) > 1 and a not in taken)
        if not axes or size % math.prod(mesh[axis] for axis in axes):
            parts.append(None)
        else:
            taken.update(axes)
            parts.append(axes if len(axes) > 1 else axes[0])
    return PartitionSpec(*parts)


def held(letters: str, shape: tuple[int, ...]) -> int:
    """How many numbers of such an array a device holds."""
    mesh = sizes()
    axes = [part if isinstance(part, tuple) else (part,) for part in placed(letters, shape, mesh) if part]
    return math.prod(shape) // math.prod(mesh[axis] for part in axes for axis in part)


def place(x: Array, letters: str) -> Array:
    """x, said to lie as the rules say of its first axes, given by letters, and whole along the others.

    A parameter that is kept in parts is put together by this where it is used.
    """
    if mesh := sizes():
        return jax.lax.with_sharding_constraint(x, placed(letters, x.shape, mesh))
    return x


def place_found(x_BTD: Array) -> Array:
    """What was looked up in a table of words whose widths are kept in parts, before each device has its own rows of it.

    Said in between, so that the partitioner swaps rows for widths and does not send all to all devices.
    """
    if mesh := sizes():
        sides = zip((DATA, SEQUENCE, FSDP), x_BTD.shape, strict=True)
        axes = [axis if size % mesh.get(axis, 1) == 0 else None for axis, size in sides]
        return jax.lax.with_sharding_constraint(x_BTD, PartitionSpec(*axes))
    return x_BTD


def sizes() -> dict[str, int]:
    """Of the axes of the mesh that is traced for; none without one, on a mesh of other axes, and within code that is
    written for one device of many."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(mesh.axis_names) <= set(AXES) and not mesh.manual_axes else {}

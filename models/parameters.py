"""A module's parameters as a flat dict with readable names, e.g. "stages.0.layers.1.query.w".

Training, checkpoints and layouts deal in these dicts: flattening a module costs Python time for each of its leaves, so
a step is given the dict and puts the module together while it is traced.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from layers.ops.tables import Spread, Table

Params = dict[str, Array]


class Spec(NamedTuple):
    """What a parameter says of itself."""

    shape: tuple[int, ...]
    axes: str  # a letter an axis (layers/layer.py); "L" leads where layers are stacked
    decay: bool  # whether weight decay applies
    residual: bool  # whether it writes to the residual stream
    fan_in: str  # of a matrix: the axes that a product sums over; "" for what is not a matrix
    table: bool = False  # whether its rows are looked up: trained by Adam, faster than the rest, and clipped apart


class Structure(NamedTuple):
    """All of a module but its arrays. spread: of the tables that are looked up with regard to where their rows lie."""

    treedef: Any
    specs: dict[str, Spec]
    spread: Mapping[str, Spread] = MappingProxyType({})

    def module(self, params: Mapping[str, Any]) -> Any:
        """params: arrays by name, or tables as they are lent."""
        return jax.tree.unflatten(self.treedef, [self._lent(name, params[name]) for name in self.specs])

    def _lent(self, name: str, param: Any) -> Any:
        if name not in self.spread:
            return param
        table = param if isinstance(param, Table) else Table(param)
        return dataclasses.replace(table, spread=self.spread[name])


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def flatten(module: Any) -> tuple[Params, Structure]:
    """(parameters by name, structure); works on a module of arrays, tracers or ShapeDtypeStructs alike.

    Raises TypeError if the module holds an array that is not a Param.
    """
    variables = jax.tree.leaves_with_path(module, is_leaf=is_variable)
    leaves, treedef = jax.tree.flatten(module)
    params, specs = {}, {}
    for (path, variable), leaf in zip(variables, leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(variable, nnx.Param):
            raise TypeError(f"{name} of {type(module).__name__} is no Param: keep constants in the layer's config")
        meta = variable.get_metadata()
        axes = meta.get("axes", "")
        if len(axes) < len(leaf.shape):
            axes = "L" * (len(leaf.shape) - len(axes)) + axes
        params[name] = leaf
        specs[name] = Spec(
            tuple(leaf.shape),
            axes,
            decay=meta.get("decay", True),
            residual=meta.get("residual", False),
            fan_in=meta.get("fan_in", ""),
            table=meta.get("table", False),
        )
    return params, Structure(treedef, specs)

"""Floating-point operations of a computation, counted in its jaxpr: nothing is declared by hand, scans multiply out.

XLA's own cost analysis leaves out the trips of loops. Only products of matrices are counted, as is usual for model
FLOPs; a while loop whose length is not known counts once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable, *args: Any) -> int:
    """Of one call; args may be ShapeDtypeStructs."""
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * summed
    inner = [_jaxpr(j) for value in params.values() for j in _inside(value)]
    if name == "cond":
        return max(inner, default=0)
    if name == "scan":
        return params["length"] * sum(inner)
    return sum(inner)


def _inside(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    if isinstance(value, tuple | list):
        return [j for item in value for j in _inside(item)]
    return []

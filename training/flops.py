"""Floating-point operations of a computation, counted in its jaxpr: nothing is declared by hand, scans multiply out.

XLA's own cost analysis leaves out the trips of loops. Only products of matrices are counted, as is usual for model
FLOPs. A loop whose length only the data knows says by its scope how often it usually turns ("usually_16"), or counts
once.
"""

import math
import re
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
    if name == "while":
        said = re.findall(r"usually_(\d+)", str(equation.source_info.name_stack))
        return int(said[-1] if said else 1) * sum(inner)
    return sum(inner)


def _inside(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return [value.jaxpr]
    if isinstance(value, tuple | list):
        return [j for item in value for j in _inside(item)]
    return []

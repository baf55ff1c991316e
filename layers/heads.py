"""How the width of a layer is shared out among its heads when the config leaves that open."""

from fractions import Fraction
from typing import Any


def head_size(config: Any, field: str, D: int, share: Fraction | int = 1) -> int:
    """`config.field` if it is given, else share · D / H. Raises ValueError, naming the field, if that is not whole."""
    value = getattr(config, field)
    if value is not None:
        return value
    size = Fraction(share) * D / config.H
    if size.denominator > 1:
        fit = ", ".join(str(n) for n in range(1, D + 1) if (Fraction(share) * D / n).denominator == 1)
        raise ValueError(
            f"{type(config).__name__}.H is {config.H}: {share} · D / H with D = {D} is not whole, "
            f"so give {field}, or use one of {fit} for H"
        )
    return size.numerator


def even(config: Any, K: int) -> None:
    """Raises ValueError, naming the field, unless rotary positions can turn heads of width K."""
    if K % 2:
        raise ValueError(
            f"{type(config).__name__}.K is {K}: rotary positions turn pairs of channels, so it must be even"
        )

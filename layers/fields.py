"""What a frozen dataclass asks of its fields; nothing here needs jax, so that laws of rows can be made without it."""

import dataclasses
from typing import Any, Literal, get_args, get_origin


def positive(config: Any, *fields: str) -> None:
    """Raises ValueError, naming the field, unless each of `fields` is at least 1. For `__post_init__`."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"{type(config).__name__}.{field} is {value}: it must be at least 1")


def above_zero(config: Any, *fields: str) -> None:
    """Raises ValueError, naming the field, unless each of `fields` is above 0, or None. For `__post_init__`."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise ValueError(f"{type(config).__name__}.{field} is {value}: it must be above 0")


def one_of(config: Any) -> None:
    """Raises ValueError, naming the field, unless each that is typed as a Literal holds one of its words.

    For `__post_init__`.
    """
    for field in dataclasses.fields(config):
        words, value = get_args(field.type), getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in words:
            name = f"{type(config).__name__}.{field.name}"
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(str, words))}")


def divides(config: Any, part: str, whole: str) -> None:
    """Raises ValueError, naming both fields, unless `part` divides `whole`. For `__post_init__`."""
    a, b = getattr(config, part), getattr(config, whole)
    if b % a:
        fit = ", ".join(str(n) for n in range(1, b + 1) if b % n == 0)
        name = f"{type(config).__name__}.{part}"
        raise ValueError(f"{name} is {a}, which does not divide {whole} = {b}: use one of {fit}")

"""Layers: one memory a file. `discover()` finds them all; the file system is the registry."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layers.layer import LayerConfig


def discover() -> "tuple[type[LayerConfig], ...]":
    """Every concrete LayerConfig defined in this room, sorted by name; a new file is found without being listed."""
    from layers.layer import LayerConfig  # imports jax

    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")

    def below(cls: type[LayerConfig]) -> set[type[LayerConfig]]:
        children = [c for c in cls.__subclasses__() if c.__module__.startswith(f"{__name__}.")]
        return set(children).union(*map(below, children))

    concrete = {cls for cls in below(LayerConfig) if cls.build is not LayerConfig.build}
    return tuple(sorted(concrete, key=lambda cls: cls.__name__))

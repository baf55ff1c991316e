"""Configs as files: found by name or path, described in a line, written back as Python, compared field by field.

A config is a Python file that ends in `config = Experiment(...)`; its description is read without running it.
"""

import ast
import dataclasses
import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A config that cannot be used: one line that names what is wrong and what would be right."""


def config_files() -> dict[str, Path]:
    """The configs of this repository, by name."""
    return {path.stem: path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "__init__"}


def describe(path: Path) -> str:
    """The first line of a config's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def locate(name: str) -> Path:
    """The file of a config: a name in configs/, a path to a .py file, or a run folder (its saved config)."""
    files = config_files()
    if name in files:
        return files[name]
    path = Path(name)
    if path.is_dir() and (path / "config.py").is_file():
        return path / "config.py"
    if path.suffix == ".py" and path.is_file():
        return path
    near = difflib.get_close_matches(name, files, 1)
    hint = f"did you mean {near[0]}?" if near else "a config is a name in configs/, a .py file, or a run folder"
    raise ConfigError(f"no config {name!r}: {hint} There are: {', '.join(files)}")


def load(path: Path) -> Any:
    """The `config` that a file defines."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look their module up
    try:
        spec.loader.exec_module(module)
    except (ValueError, TypeError, ImportError, SyntaxError, AttributeError, NameError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not hasattr(module, "config"):
        raise ConfigError(f"{path} defines no `config`: end it in `config = Experiment(...)`")
    return module.config


def render(config: Any) -> str:
    """A config as a Python file that builds it again, whole: every field, also those left at their defaults."""
    classes: set[type] = set()

    def collect(value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            classes.add(type(value))
            for field in dataclasses.fields(value):
                collect(getattr(value, field.name))
        elif isinstance(value, tuple | list):
            for item in value:
                collect(item)

    collect(config)
    modules: dict[str, list[str]] = {}
    for cls in classes:
        modules.setdefault(cls.__module__, []).append(cls.__name__)
    lines = [f'"""{config.description}"""', ""]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(modules.items())]
    return "\n".join([*lines, "", f"config = {_source(config, 0)}", ""])


def _source(value: Any, depth: int) -> str:
    inner, outer = "    " * (depth + 1), "    " * depth
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [f"{f.name}={_source(getattr(value, f.name), depth + 1)}" for f in dataclasses.fields(value) if f.init]
        opening, closing = f"{type(value).__name__}(", ")"
    elif isinstance(value, tuple):
        items = [_source(item, depth + 1) for item in value]
        opening, closing = "(", ",)" if len(items) == 1 else ")"
    else:
        return repr(value)
    line = opening + ", ".join(items) + closing
    if len(line) + len(outer) <= 100 and "\n" not in line:
        return line
    return opening + "\n" + "".join(f"{inner}{item},\n" for item in items) + outer + ")"


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) wherever two configs differ, by dotted path."""
    if type(old) is not type(new):
        return [(path, old, new)]
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        found = []
        for field in dataclasses.fields(old):
            name = f"{path}.{field.name}" if path else field.name
            found += differences(getattr(old, field.name), getattr(new, field.name), name)
        return found
    if isinstance(old, tuple) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [(path, old, new)]

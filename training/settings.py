"""Configs as files: found by name or path, described in a line, written back as Python, compared field by field.

A config is a Python file that ends in `config = Experiment(...)`; its description is read without running it. It may
also have `sizes`, a dict of experiments: NAME@SIZE is one of them.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = "_config_"  # begins the module names of files that `load` runs


class ConfigError(ValueError):
    """A config that cannot be used: one line that names what is wrong and what would be right."""


def config_files() -> dict[str, Path]:
    """The configs of this repository, by name."""
    return {path.stem: path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "__init__"}


def describe(path: Path) -> str:
    """The first line of a config's docstring, read without importing it."""
    try:
        return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    except (SyntaxError, ValueError, OSError) as error:  # one broken file must not hide the others
        return f"(cannot be read: {error})"


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
    hint = f"did you mean {near[0]}?" if near else "give a .py file, a run folder, or a name in configs/."
    raise ConfigError(f"there is no config {name!r}: {hint} Known: {', '.join(files)}")


def execute(path: Path) -> Any:
    """The module that a config's file makes. Raises ConfigError, with the line at fault, if it cannot be run."""
    spec = importlib.util.spec_from_file_location(FILE + path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is a program: anything can go wrong in it
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == spec.origin]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{path}{f', line {lines[-1]}' if lines else ''}: {kind}{error}") from error
    return module


def load(path: Path, size: str = "") -> Any:
    """The `config` that a file defines, or one of its `sizes`. Raises ConfigError if there is none to be had."""
    module = execute(path)
    from training.experiment import Experiment  # imports jax

    sizes = getattr(module, "sizes", {})
    if size and size not in sizes:
        known = f"it has {', '.join(sizes)}" if sizes else "it has none"
        raise ConfigError(f"{path.stem}@{size}: {path} has no size {size!r}: {known}")
    config = sizes[size] if size else getattr(module, "config", None)
    if not isinstance(config, Experiment):
        found = "it has no `config`" if config is None else f"its `config` is of type {type(config).__name__}"
        raise ConfigError(f"{path}: {found}; end the file in `config = Experiment(...)`")
    return config


def render(config: Any) -> str:
    """A config as a Python file that builds it again, whole: every field, also those left at their defaults.

    Raises ConfigError for a class that such a file could not import.
    """
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
        if cls.__module__.startswith(FILE) or cls.__module__ == "__main__" or cls.__qualname__ != cls.__name__:
            raise ConfigError(
                f"{cls.__qualname__} is defined in a config file, where a saved config cannot import it from: "
                "move it to a file of its own, such as layers/mine.py"
            )
        modules.setdefault(cls.__module__, []).append(cls.__name__)
    simple = not set(config.description) & set('"\\') and config.description.isprintable()
    lines = [f'"""{config.description}"""' if simple else repr(config.description), ""]
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
    elif isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
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


def changes(text: str, config: Any) -> list[tuple[str, str, str]]:
    """`differences` of the config that a text by `render` makes, and another; values are as Python writes them.

    Nothing of the text is run. A field that it does not know yet had its default. Raises ValueError for other texts.
    """
    try:
        (node,) = (statement.value for statement in ast.parse(text).body if isinstance(statement, ast.Assign))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not the text of a config") from None
    return _changes(node, config, "")


def _changes(node: ast.expr, value: Any, path: str) -> list[tuple[str, str, str]]:
    cls, start = type(value), f"{path}." if path else ""
    if dataclasses.is_dataclass(cls) and isinstance(node, ast.Call) and ast.unparse(node.func) == cls.__name__:
        said = {keyword.arg or "": keyword.value for keyword in node.keywords}
        found = []
        for field in dataclasses.fields(cls):
            new, name = getattr(value, field.name), start + field.name
            if field.name in said:
                found += _changes(said[field.name], new, name)
            elif field.init and new != (old := _default(field)):
                found.append((name, repr(old), repr(new)))
        gone = [name for name in said if name not in inspect.signature(cls).parameters]
        return found + [(start + name, ast.unparse(said[name]), "no field any more") for name in gone]
    if isinstance(value, tuple) and isinstance(node, ast.Tuple) and len(node.elts) == len(value):
        pairs = enumerate(zip(node.elts, value, strict=True))
        return [change for i, (old, new) in pairs for change in _changes(old, new, f"{start}{i}")]
    old, new = ast.unparse(node), ast.unparse(ast.parse(_source(value, 0)).body[0])
    return [] if old == new else [(path, old, new)]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def replaced(config: Any, path: str, value: Any) -> Any:
    """A config with another value at a dotted path, such as "model.stages.0.pattern.1.H"; numbers count in tuples.

    Raises ConfigError for a path that leads nowhere, and for what the configs on the way refuse.
    """
    first, _, rest = path.partition(".")
    if isinstance(config, tuple) and first.isdigit() and int(first) < len(config):
        index = int(first)
        return (*config[:index], replaced(config[index], rest, value) if rest else value, *config[index + 1 :])
    fields = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if first not in fields:
        known = ", ".join(fields) if fields else f"0 to {len(config) - 1}" if isinstance(config, tuple) else "none"
        raise ConfigError(f"there is no field {first!r} in {type(config).__name__} (it has {known})")
    try:
        return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error

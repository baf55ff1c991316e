"""A command line made from a config: a flag for every field, help from docstrings, and one line for what is wrong.

Docstrings say their fields as the house writes them: `name: what it is. other, third: what these are.`
"""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from training.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that train together: found where TPU slices, Slurm, Kubernetes or Open MPI say so, or given.

    coordinator: host:port that the first process listens at, and all others reach.
    count: how many there are; 1: train alone, whatever the surroundings say.
    index: which one this is, from 0.
    heartbeat: seconds without a sign of life after which a process counts as dead, and the others leave.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    heartbeat: int = 10

    def __post_init__(self):
        if self.heartbeat < 3:
            raise ConfigError(f"processes.heartbeat is {self.heartbeat}: it must be at least 3 seconds")
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        if self.count == 1 or not any(value is not None for value in given.values()):
            return
        for name, value in given.items():
            if value is None:
                raise ConfigError(f"processes.{name} is missing: give --processes.coordinator, .count and .index, all")
        if not re.fullmatch(r"\S+:\d+", self.coordinator or ""):
            raise ConfigError(f"processes.coordinator is {self.coordinator!r}: give host:port of the first process")
        assert self.count is not None and self.index is not None
        if self.count < 1:
            raise ConfigError(f"processes.count is {self.count}: it must be at least 1")
        if not 0 <= self.index < self.count:
            raise ConfigError(f"processes.index is {self.index}: it must be 0 to {self.count - 1}")


@dataclasses.dataclass(frozen=True)
class Options:
    """What train.py was asked for.

    run: folder of the run.
    resume: auto: go on where the folder has a run; never: refuse such a folder; or the folder of another run to begin
        from.
    dry_run: stop after the summary.
    profile: steps to trace, such as 20:22, into RUN/profile, for xprof or Perfetto.
    hung: seconds without the end of a step, after the first, at which the process ends; 0 for never. RUN/hung.txt then
        says what it was at.
    processes: that train together.
    """

    experiment: Annotated[Any, tyro.conf.arg(name="")]
    run: Path
    resume: str = "auto"
    dry_run: bool = False
    profile: str | None = None
    hung: float = 1800.0
    processes: Processes = Processes()


Asked = TypeVar("Asked")


def parse(default: Asked, arguments: Sequence[str], *, program: str) -> Asked:
    """A dataclass of options with the fields that the flags change. --help prints and raises SystemExit(0).

    Raises ConfigError, in one line, for a flag that no field has (with those that are near), for a value of the wrong
    type, and for what a config refuses.
    """
    _refuse_unknown([argument for argument in arguments if argument.startswith("--")], default, program)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(default), args=arguments, prog=program, default=default, registry=_REGISTRY)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ConfigError(_first_paragraph(said.getvalue())) from None
    except ValueError as error:  # of the whole experiment; those of its parts tyro has drawn as boxes
        raise ConfigError(str(error)) from error


_REGISTRY = ConstructorRegistry()


@_REGISTRY.struct_rule
def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The fields of a config, or of a tuple of configs, of which there is a default. Each stays of the type that it
    is: of a choice such as AdamW or Muon only the chosen one has flags, without a word that selects it."""
    default = info.default
    if isinstance(default, tuple) and default and all(map(_is_config, default)):
        items = (StructFieldSpec(str(i), type(item), item, _summary(type(item))) for i, item in enumerate(default))
        return StructConstructorSpec(lambda **values: tuple(values.values()), tuple(items))
    if not _is_config(default):
        return None
    kind = type(default)
    hints, helps = typing.get_type_hints(kind, include_extras=True), field_helps(kind)
    specs = []
    for field in dataclasses.fields(default):
        value, hint = getattr(default, field.name), hints[field.name]
        if _is_config(value):
            metadata = getattr(hint, "__metadata__", ())
            hint = Annotated[(type(value), *metadata)] if metadata else type(value)
        elif value is None and any(map(dataclasses.is_dataclass, typing.get_args(hint))):
            hint = None  # without a config to take flags from, there is nothing to choose
        text = helps.get(field.name) or (_summary(type(value)) if _is_config(value) else "")
        specs.append(StructFieldSpec(field.name, hint, value, text))
    return StructConstructorSpec(lambda **values: kind(**values), tuple(specs))


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _summary(kind: type) -> str:
    """A config's name and the first sentence of its docstring."""
    sentence = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return kind.__name__ if sentence.startswith(f"{kind.__name__}(") else f"{kind.__name__}: {sentence}"


def field_helps(kind: type) -> dict[str, str]:
    """What a dataclass's docstring, or that of a class it is made from, says of its fields, by name."""
    found: dict[str, str] = {}
    for cls in kind.__mro__:
        names = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        text = " ".join((cls.__doc__ or "").split())
        if not names or text.startswith(f"{cls.__name__}("):  # what dataclasses write where nobody did
            continue
        name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        marks = list(re.finditer(rf"(?:(?<=^)|(?<=[.;:] ))((?:{name})(?:(?:, | and )(?:{name}))*): ", text))
        for mark, after in zip(marks, [*marks, None][1:], strict=True):
            said = text[mark.end() : after.start() if after else None].strip().rstrip(".;")
            for field in re.split(", | and ", mark[1]):
                found.setdefault(field, said)
    return found


def flags(config: Any, path: str = "") -> Iterator[str]:
    """The flags of a config, without dashes: model.D, train.steps, ..."""
    if _is_config(config):
        for field in dataclasses.fields(config):
            name = "" if field.name == "experiment" else f"{path}.{field.name}".lstrip(".")
            yield from flags(getattr(config, field.name), name)
    elif isinstance(config, tuple) and config and all(map(_is_config, config)):
        for index, item in enumerate(config):
            yield from flags(item, f"{path}.{index}")
    else:
        yield path
        if isinstance(config, bool):
            before, dot, last = path.rpartition(".")
            yield f"{before}{dot}no_{last}"


def _refuse_unknown(given: list[str], default: Any, program: str) -> None:
    known = {*flags(default), "help"}
    for flag in given:
        name = flag[2:].split("=")[0].replace("-", "_")
        if name and name not in known and not name.startswith("tyro_"):
            ends = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
            near = difflib.get_close_matches(name, [k for k in known if k not in ends], 3)
            hint = f"did you mean {' or '.join('--' + k for k in (sorted(ends) + near)[:3])}? " * bool(ends or near)
            raise ConfigError(f"there is no field {flag.split('=')[0]}: {hint}{program} --help lists all fields")


def _first_paragraph(box: str) -> str:
    """The sentence of an error that is drawn as a box: what stands before the first rule, without its title."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    lines = [line for line in lines if line]
    if lines and "─" in lines[0]:
        lines = lines[1:]
    end = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return " ".join(lines[:end]).removeprefix("Error parsing ").replace("experiment.", "")

"""What `python probe.py` was asked for."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from probes.tasks.task import Trial, discover
from training.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class Common:
    """Small models, trained on probes and asked them.

    probes: names of probes; python probe.py --help lists them.
    folder: where probe.jsonl and the report are; what is in probe.jsonl is not trained again.
    seeds: models of each kind.
    steps: of training; None for as many as each probe says.
    lr: peak learning rate; None for what each probe says (of a config: for its own optimizer).
    """

    probes: tuple[str, ...] = ("mqar",)
    folder: Path = Path("runs/probes")
    seeds: int = 3
    steps: int | None = None
    lr: float | None = None


@dataclasses.dataclass(frozen=True)
class OfLayers(Common):
    """Layers in a small model of their own, by default two blocks after Zoology.

    D: width; None for what each probe says. blocks: how often the layer is in the model; None likewise.
    """

    D: int | None = None
    blocks: int | None = None


@dataclasses.dataclass(frozen=True)
class OfLayer(OfLayers):
    """One layer, whose fields can be changed.

    layer: the layer under test.
    """

    layer: Any = None


@dataclasses.dataclass(frozen=True)
class OfConfig(Common):
    """A config's model.

    model: its model; the vocabulary becomes the task's.
    """

    model: Any = None


@dataclasses.dataclass(frozen=True)
class OfRun:
    """A trained language model, asked in text (probes/text.py).

    probes: passkey, needle, phonebook, copying, order, read_twice.
    lengths: of the documents, in tokens; none for 1, 2, 4, 8 and 16 times the training length.
    rows: questions of each kind and length. batch: rows read at once.
    twice: each prompt is read twice before it is answered, as recurrent models like it (JRT-prompt).
    step: the checkpoint to ask; None for the newest.
    folder: where probe.jsonl and the report are; None for the run's own folder, probes/.
    """

    probes: tuple[str, ...] = ("passkey", "needle", "phonebook", "copying", "order", "read_twice")
    lengths: tuple[int, ...] = ()
    rows: int = 64
    batch: int = 16
    twice: bool = False
    step: int | None = None
    folder: Path | None = None


def trials(options: Common) -> dict[str, Trial]:
    """The trials that were asked for, with what the options change. ConfigError for a name that no trial has."""
    known, found = discover(), {}
    for name in options.probes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"there is no probe {name!r}: {hint}python probe.py --help lists them")
        changes = {
            field: value
            for field in ("steps", "lr", "D", "blocks")
            if (value := getattr(options, field, None)) is not None
        }
        for field, value in changes.items():
            if value <= 0:
                raise ConfigError(f"{field} is {value}: it must be above 0")
        found[name] = dataclasses.replace(known[name], **changes)
    if options.seeds < 1:
        raise ConfigError(f"seeds is {options.seeds}: it must be at least 1")
    return found

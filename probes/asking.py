"""The two jobs of `python probe.py`: ask a trained model, or train small ones and ask them."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import layers
from layers.layer import LayerConfig
from models.lm import LM
from probes import report, text_report
from probes.options import OfConfig, OfLayer, OfLayers, OfRun, trials
from probes.small_runs import Ledger
from probes.tasks.task import discover
from probes.text import FORMS
from probes.trial import Attempt, adapted, run, small, usual
from training.flags import parse
from training.run import load_model
from training.settings import ConfigError, config_files, differences, load, locate

ALL = "layers"
APART = ("Engram", "GatedConv", "MLP", "ProductKeyMemory")  # parts of a model that are no memory of what a row says


def overview() -> str:
    """The probes and the layers, a line each."""
    known = discover()
    lines = ["probes for CONFIG or LAYER (others of their sizes behind them):"]
    for name in (name for name in known if "@" not in name):
        sizes = ", ".join(other.partition("@")[2] for other in known if other.startswith(f"{name}@"))
        lines.append(f"  {name:20}{report.about(name)[:150]}{f'  [@{sizes}]' if sizes else ''}")
    lines += ["", "probes for RUN:", *(f"  {form:20}{text_report.ABOUT[form]}" for form in FORMS)]
    lines += ["", "layers:", "  " + ", ".join(memories())]
    lines += ["", "configs:", "  " + ", ".join(config_files())]
    return "\n".join(lines)


def memories() -> dict[str, type[LayerConfig]]:
    """The layers that mix tokens, by name."""
    return {cls.__name__: cls for cls in layers.discover() if cls.__name__ not in APART}


def ask_run(folder: Path, flags: Sequence[str], command: str) -> Path:
    options = parse(OfRun(), flags, program=f"python probe.py {folder}")
    for form in options.probes:
        if form not in FORMS:
            raise ConfigError(f"there is no probe {form!r} in text: they are {', '.join(FORMS)}")
    for field in ("rows", "batch"):
        if getattr(options, field) < 1:
            raise ConfigError(f"{field} is {getattr(options, field)}: it must be at least 1")
    trained = load_model(folder, options.step)
    _, experiment, dataset = trained
    if not dataset.token_bytes.any():
        raise ConfigError(
            f"{folder} was trained on {type(experiment.data).__name__}, not on text: ask it by its config"
        )
    T = experiment.data.T
    where = options.folder or folder / "probes"
    ledger = Ledger(where / "probe.jsonl")
    key = {"run": folder.name, "step": newest(folder) if options.step is None else options.step}
    lengths = options.lengths or tuple(T * k for k in (1, 2, 4, 8, 16))
    text_report.run(ledger, trained, key, options, lengths, command, Console())
    mine = [row for row in ledger.rows if (row["run"], row["step"]) == (key["run"], key["step"])]
    if not mine:
        raise ConfigError("nothing could be asked: give longer documents with --lengths")
    return text_report.write(mine, where, folder.name)


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint."""
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def ask_small(names: Sequence[str], flags: Sequence[str], command: str) -> Path:
    known = memories()
    if list(names) == [ALL]:
        names = list(known)
    program = f"python probe.py {' '.join(names)}"
    every = {cls.__name__: cls for cls in layers.discover()}
    attempts: list[Attempt] = []
    options: Any
    if all(name in every for name in names):
        if len(names) == 1:
            options = parse(OfLayer(layer=every[names[0]]()), flags, program=program)
            chosen = {_named(names[0], every[names[0]](), options.layer): options.layer}
        else:
            options = parse(OfLayers(), flags, program=program)
            chosen = {name: every[name]() for name in names}
        for probe, trial in trials(options).items():
            for name, layer in chosen.items():
                attempts.append(Attempt(name, small(layer, trial), probe, trial, usual(trial)))
    elif len(names) == 1:
        name, _, size = names[0].partition("@")
        if name not in config_files() and not Path(name).exists():
            near = difflib.get_close_matches(name, [*every, *config_files()], 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see python probe.py --help"
            raise ConfigError(f"there is no run, config or layer {name!r}: {hint}")
        experiment = load(locate(name), size)
        options = parse(OfConfig(model=experiment.model), flags, program=program)
        title = _named(names[0], experiment.model, options.model)
        for probe, trial in trials(options).items():
            optimizer = experiment.optimizer
            if options.lr is not None:
                optimizer = dataclasses.replace(optimizer, lr=options.lr)
            attempts.append(Attempt(title, adapted(options.model, trial), probe, trial, optimizer))
    else:
        strange = next(name for name in names if name not in every)
        near = difflib.get_close_matches(strange, every, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"layers are {', '.join(every)}"
        raise ConfigError(f"there is no layer {strange!r} (several names must all be layers): {hint}")
    ledger = Ledger(options.folder / "probe.jsonl")
    run(ledger, attempts, options.seeds, Console(), command)
    return report.write(ledger.rows, options.folder)


def _named(name: str, usual: LayerConfig | LM, given: LayerConfig | LM) -> str:
    """A name with what differs from what it stands for."""
    return " ".join([name, *(f"{field}={new}" for field, _, new in differences(usual, given))])

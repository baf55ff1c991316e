"""What a run says: metrics.jsonl (the record), trackers (TensorBoard, Weights & Biases), and the line on the terminal.

metrics.jsonl holds one JSON object a line. A training line has at least `step` and `loss`; an evaluation line has
"kind": "eval" as well; one of "kind": "skipped" says of a step that changed nothing which `batch` of which `seed` it
had (Dataset.batch), and where its `rows` come from (Dataset.places).

Numbers are written with every digit they have (repr); what is not finite becomes one of the strings "nan", "inf",
"-inf", which JSON lacks as numbers, and `read` turns back.
"""

import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"  # where lines of it go that cannot be read
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Log:
    """The metrics of one run: every line is in the file when `write` returns, so kill -9 takes nothing written.

    folder: the run's; metrics.jsonl is continued if it exists (call `rewind` when resuming from an earlier step).
    tensorboard: also writes scalars for TensorBoard into folder/tensorboard.
    wandb: the name of a Weights & Biases project to write to, or None. Needs the `wandb` package.

    Neither a tracker nor a disk that fails stops a training: one warning, and the run goes on without it.
    """

    def __init__(self, folder: Path | str, *, tensorboard: bool = True, wandb: str | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS
        self._rewound: int | None = None
        self._warned = False
        self._trackers: dict[str, Any] = {}  # name: a function that opens it, then what it opened
        if tensorboard:
            self._trackers["TensorBoard"] = self._open_tensorboard
        if wandb is not None:
            self._trackers["Weights & Biases"] = lambda: _WandB(self.folder, wandb)
        self._cut_partial_line()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line. metrics: numbers, arrays of them (lists in the file) and strings."""
        line = {"step": int(step)} | {name: _plain(value) for name, value in metrics.items()}
        self._append(line)
        kind = str(line.get("kind", "train"))
        scalars = {
            f"{kind}/{name}": float(value)
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for name in list(self._trackers):
            self._tell(name, lambda tracker: tracker.scalars(step, scalars))

    def rewind(self, step: int) -> None:
        """Drops every line after `step` and a last line cut short, in one rename: for a run resumed at `step`.

        Lines that rot has made unreadable are put aside, with a warning.
        """
        lines = _lines(self.path)
        if damaged := [text for text, line in lines if line is None]:
            aside = self.folder / DAMAGED
            _put(aside, "ab", damaged)
            logger.warning("%s: lines that cannot be read are now in %s: %d", self.path, aside.name, len(damaged))
        temporary = self.path.with_suffix(".tmp")
        _put(temporary, "wb", [text for text, line in lines if line is not None and line["step"] <= step])
        os.replace(temporary, self.path)
        os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._rewound = step

    def close(self) -> None:
        """Closes the file and the trackers."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for name in list(self._trackers):
            if not callable(self._trackers[name]):
                self._tell(name, lambda tracker: tracker.close())
        self._trackers.clear()

    def _append(self, line: dict[str, Any]) -> None:
        content = (json.dumps(_written(line), allow_nan=False) + "\n").encode()
        try:
            before = os.fstat(self._file).st_size
            try:
                done = os.write(self._file, content)  # one call: other readers see whole lines
                if done < len(content):
                    done += os.write(self._file, content[done:])  # raises the reason, mostly a full disk
            except OSError:
                os.ftruncate(self._file, before)
                raise
        except OSError as error:
            if not self._warned:
                logger.warning("%s could not be written (%s); training goes on", self.path, error.strerror)
                self._warned = True

    def _cut_partial_line(self) -> None:
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def _open_tensorboard(self) -> Any:
        return _TensorBoard(self.folder / "tensorboard", self._rewound)

    def _tell(self, name: str, say: Callable[[Any], None]) -> None:
        try:
            if callable(self._trackers[name]):
                self._trackers[name] = self._trackers[name]()
            say(self._trackers[name])
        except Exception as error:  # whatever a tracker raises, the training matters more
            del self._trackers[name]
            if isinstance(error, ImportError):
                logger.warning("%s is off: the package %s is not installed", name, error.name)
            else:
                logger.warning("%s failed and is off from here on: %s: %s", name, type(error).__name__, error)


class NoLog(Log):
    """Of a process that is not the first: the first one's lines say it all."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path, rewound: int | None):
        from tensorboardX import SummaryWriter

        # purge_step hides what an earlier process wrote after the step this one resumes from.
        self.writer = SummaryWriter(str(folder), purge_step=None if rewound is None else rewound + 1)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str):
        import wandb

        name = folder / "wandb_id"  # the same page after a resume
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=project, name=folder.name, id=name.read_text().strip(), dir=str(folder), resume="allow"
        )
        self.run.define_metric("*", step_metric="step")  # W&B's own counter never goes back; ours may, on a resume

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        self.run.finish()


def read(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in the order written, without a last one cut short; [] if there is no file.

    Raises ValueError naming the line if another one is no JSON object with a `step`.
    """
    path, found = Path(folder) / METRICS, []
    for number, (text, line) in enumerate(_lines(path), 1):
        if line is None:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step: {text[:60]!r}")
        found.append(_read(line))
    return found


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each whole line, and what it says: None for one that is no JSON object with a step."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [(text + b"\n", _parse(text)) for text in lines]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _put(path: Path, mode: str, lines: list[bytes]) -> None:
    """Writes lines, and returns when they are on the disk."""
    with open(path, mode) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    """Numbers of any library, and arrays of them, as Python's own; a float32 keeps its exact value."""
    if isinstance(value, str | int | float) or value is None:
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value]


def _written(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, dict):
        return {name: _written(x) for name, x in value.items()}
    return [_written(x) for x in value] if isinstance(value, list) else value


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _read(x) for name, x in value.items()}
    return [_read(x) for x in value] if isinstance(value, list) else value


class Progress:
    """Where a run is: a bar on a terminal, else a plain line now and then (first, last, every `every` seconds).

    total: steps of the whole run. start: the step it resumes from. console: where to write; the terminal by default.
    """

    def __init__(self, total: int, *, start: int = 0, every: float = 10.0, console: Console | None = None):
        self.total, self.start, self.every = total, start, every
        self.console = console or Console(file=sys.stdout)
        self._began = self._spoke = time.monotonic()
        self._silent = True
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.fields[text]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            # Rich takes the speed from what is completed since the task began, so a resumed run's ETA is right.
            self._task = self._bar.add_task("", total=self.total, completed=self.start, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, **metrics: float | str) -> None:
        """Shows a step. metrics: shown as name and value (`tokens_per_second` as "12,345 tokens/s"), in their order."""
        text = "  ".join(_shown(name, value) for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if self._silent or step >= self.total or now - self._spoke >= self.every:
            self._silent, self._spoke = False, now
            done = step - self.start
            left = (self.total - step) * (now - self._began) / done if done > 0 else None
            self.print(f"step {step}/{self.total}  {text}" + (f"  eta {clock(left)}" if left is not None else ""))

    def print(self, text: str) -> None:
        """A line that stays, above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name.replace('_', ' ')} {value:.4g}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

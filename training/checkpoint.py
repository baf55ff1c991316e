"""Checkpoints that survive kill -9, full disks and rot.

A checkpoint is a folder named by its step:

    00000300/
        arrays/      written by orbax, all groups in one store; any mesh can read what any other wrote
        meta.json    {"format", "step", "metric", "arrays": {group: {name: [dtype, shape]}}, "meta": the caller's}
        SHA256SUMS   the digest of every file above (`sha256sum -c SHA256SUMS` checks it by hand)

It is written under `tmp-00000300-1` and renamed when every byte, the digests included, is on the disk: a folder with
a step's name is whole or was damaged later. Orbax alone restores flipped bits without a word, hence the digests.
Nothing here unpickles or executes what it reads.

Several processes write one checkpoint, into one folder that all of them see. Each writes what its devices hold, and the
digests of that; the first one writes all else, renames and deletes. A process that fails to write ends them all.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from training import processes
from training.digests import ARRAYS, META, DamagedError, digest, files, reason, sync

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
TEMPORARY = "tmp-"
FORMAT = 1

Arrays = dict[str, dict[str, Any]]


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or none that can be used; the message is meant for the user."""


# Orbax tells the time by the wall's clock: a save under way when that was set ahead would have failed. One that truly
# hangs is the watchdog's (training/watch.py).
PATIENCE = 20 * 86_400  # seconds; in milliseconds an int32, which barriers take


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified before they are read.

    folder: made if absent (when writable).
    keep_last: the newest so many are kept.
    keep_best: and so many of the lowest `metric`.
    writable: False for readers of a run that may still be going: they remove nothing and cannot save.
    lost: says why the folder is not the writer's any more, "" while it is (RunLock.lost). Asked before files change.

    A writer owns the folder (take the run's lock first: training/lock.py) and removes what an interrupted save left
    behind. Use it as a context manager, or call `close`, so that the last save is complete before the program ends.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        writable: bool = True,
        lost: Callable[[], str] | None = None,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best at least 0, not {keep_last} and {keep_best}")
        self.folder = Path(folder).absolute()
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.writable = writable
        self._lost = lost or (lambda: "")
        self._orbax: Any = None
        self._writer: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._saves = 0
        self._read_together, self._save_together = (processes.Meeting(f"checkpoints-{use}") for use in ("read", "save"))
        if writable:
            if strange := sorted(set("*?[\\") & set(str(self.folder))):
                # Orbax takes its own path for a pattern where it merges its files, and so leaves them unmerged.
                raise CheckpointError(
                    f"no checkpoints can be kept in {self.folder}: choose a path without {strange[0]}"
                )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"cannot write checkpoints in {self.folder}: {reason(error)}") from error
            if processes.first():
                self._sweep()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # the exception on its way out matters more

    # Writing.

    def save(self, step: int, arrays: Arrays, meta: dict[str, Any], metric: float | None = None) -> None:
        """Starts to save a step, and returns once the arrays may be donated or deleted.

        arrays: groups of named arrays, {"params": {...}, "opt": {...}, ...}; any dtype, any sharding.
        meta: whatever JSON can hold; `restore` and `peek` give it back.
        metric: lower is better; None or a number that is not finite never counts as best.

        The writing goes on in a thread, one save at a time. A save that fails (a full disk, a folder that cannot be
        written) leaves the earlier checkpoints as they were, removes what it had written (what a late write still
        adds goes with the next save), and raises CheckpointError: this call, if it shows at once, or else the next
        `save` (which then saves nothing itself), `wait` or `close`.
        Of several processes all call it, with the same arguments.
        A checkpoint of the same step is replaced, and those of later steps (a future that a resumed run has
        abandoned) are deleted, once the new one is complete.
        """
        if not self.writable:
            raise CheckpointError(f"the checkpoints in {self.folder} were opened for reading only")
        self.wait()
        if metric is not None and not math.isfinite(metric):
            metric = None
        described = {group: {name: _describe(x) for name, x in named.items()} for group, named in arrays.items()}
        record = {"format": FORMAT, "step": step, "metric": metric, "arrays": described, "meta": meta}
        text = json.dumps(record, indent=1)
        # A name of its own: writes that a full disk refused may go on for a moment after their save has failed.
        self._saves += 1
        temporary = self.folder / f"{TEMPORARY}{step:08d}-{self._saves}"
        try:
            if processes.first():
                self._refuse_if_lost()
                self._sweep()
                temporary.mkdir(parents=True)
                need = sum(x.nbytes for named in arrays.values() for x in named.values())
                if need > (free := shutil.disk_usage(temporary).free):  # said in one line, and before gigabytes are
                    raise DamagedError(f"{need / 1e6:.0f} MB do not fit into the {free / 1e6:.0f} MB left on the disk")
            import orbax.checkpoint as ocp

            # Orbax copies from the devices before it returns. (On CPU it holds a reference that makes a donating
            # step copy; the tests hold it to that.) It refuses arrays of size zero: those live in meta.json alone.
            self._checkpointer().save(temporary / ARRAYS, args=ocp.args.PyTreeSave(_without_empty(arrays)))
        except Exception as error:
            self._give_up(temporary)
            raise self._not_saved(step, error) from error
        self._writer = threading.Thread(target=self._finish, args=(step, temporary, text), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Waits for the save under way. Raises CheckpointError if it failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits, and frees the threads. Raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _finish(self, step: int, temporary: Path, text: str) -> None:
        try:
            self._checkpointer().wait_until_finished()  # of all processes: orbax waits for each
            if processes.first():
                (temporary / META).write_text(text)
            own = {name: digest(temporary / name, on_disk=True) for name in files(temporary, processes.index())}
            sums = {name: digits for said in self._save_together.exchange(own) for name, digits in said.items()}
            if processes.first():
                self._commit(step, temporary, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
            self._save_together.exchange()  # nobody leaves before it is done
        except Exception as error:
            self._give_up(temporary)
            self._failure = self._not_saved(step, error)
            return
        try:
            if processes.first():
                self._prune(step)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be deleted: %s", self.folder, reason(error))

    def _commit(self, step: int, temporary: Path, sums: str) -> None:
        (temporary / SUMS).write_text(sums)
        for path in (temporary / SUMS, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            sync(path)
        final = self.folder / f"{step:08d}"
        self._refuse_if_lost()
        if final.exists():
            os.rename(final, self.folder / f"{TEMPORARY}replaced-{step:08d}")
        os.rename(temporary, final)
        sync(self.folder)

    def _refuse_if_lost(self) -> None:
        if lost := self._lost():
            raise DamagedError(lost)

    def _prune(self, newest: int) -> None:
        steps = self._all_steps()
        past = [step for step in steps if step <= newest]
        measured = [(metric, step) for step in past if (metric := self._metric(step)) is not None]
        keep = {*past[-self.keep_last :], *(step for _, step in sorted(measured)[: self.keep_best])}
        for step in steps:
            if step not in keep:  # renamed first: a folder with a step's name is never half deleted
                os.rename(self.folder / f"{step:08d}", self.folder / f"{TEMPORARY}deleted-{step:08d}")
        self._sweep()

    def _give_up(self, temporary: Path) -> None:
        if processes.count() == 1 and not self._lost():  # others may still write there; whoever goes on removes it
            shutil.rmtree(temporary, ignore_errors=True)

    def _sweep(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp  # 0.2 s and more: not for those who only ask for --help

            from training.hush import hush

            # Weights hardly compress (12% here, for half as much CPU time again).
            hush()
            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            self._orbax = ocp.AsyncCheckpointer(handler, async_options=ocp.AsyncOptions(timeout_secs=PATIENCE))
        return self._orbax

    def _not_saved(self, step: int, error: BaseException) -> CheckpointError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(
            f"step {step} was not saved in {self.folder}: {reason(error)} (earlier checkpoints, untouched: {kept})"
        )

    # Reading.

    def steps(self) -> list[int]:
        """The steps that look complete (nothing is verified), newest last."""
        return [step for step in self._all_steps() if all((self._path(step) / name).is_file() for name in (SUMS, META))]

    def restore(
        self,
        like: Mapping[str, Mapping[str, Any]],
        step: int | None = None,
        accept: Callable[[int, dict[str, Any]], None] = lambda step, meta: None,
    ) -> tuple[int, Arrays, dict[str, Any]] | None:
        """Reads the newest whole checkpoint, or the given step, onto the shardings of `like`.

        like: arrays or `jax.ShapeDtypeStruct`s; without a sharding an array goes to the first device. Groups that
            `like` leaves out are not read.
        accept: sees step and meta before the arrays are looked at, and raises what `restore` is to raise, if anything;
            DamagedError for a meta that is not the caller's.

        Returns (step, arrays, meta), or None where no checkpoint was ever completed. A damaged checkpoint is passed
        over with a warning that names the step, the file and the reason.

        Raises CheckpointError if every checkpoint is damaged, if the given step is absent or damaged, or if the
        arrays of a whole checkpoint are not those of `like` (another model: falling back would not help).
        """
        for candidate in self._candidates(step):
            with self._passing_over(candidate, step):
                record = self._whole(candidate, accept)
                self._compare(candidate, record["arrays"], like)
                return candidate, self._read(candidate, like), record["meta"]
        self._refuse_if_damaged()
        return None

    def peek(self, step: int | None = None) -> dict[str, Any] | None:
        """The meta of the newest checkpoint (or of the given one), verified by itself: the arrays are not read.

        None where there is no checkpoint. `restore` may still find the arrays damaged and return an earlier step.
        """
        for candidate in self._candidates(step):
            with self._passing_over(candidate, step):
                return self._record(candidate, self._sums(candidate))["meta"]
        self._refuse_if_damaged()
        return None

    def shapes(self, step: int | None = None) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """What the newest whole checkpoint (or the given one) holds, as `restore` takes it; {} where there is none."""
        for candidate in self._candidates(step):
            with self._passing_over(candidate, step):
                return _shapes(self._record(candidate, self._sums(candidate)))
        self._refuse_if_damaged()
        return {}

    def _candidates(self, step: int | None) -> list[int]:
        if self._writer is not None:
            self._writer.join()  # a save under way may be the newest
        steps = self._read_together.of_first(self._all_steps)
        if step is None:
            return steps[::-1]
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder} (there are: {known})")
        return [step]

    @contextlib.contextmanager
    def _passing_over(self, candidate: int, asked: int | None) -> Iterator[None]:
        try:
            yield
        except (DamagedError, OSError) as error:
            text = f"checkpoint of step {candidate} in {self.folder} is damaged: {reason(error)}"
            if asked is not None:
                raise CheckpointError(text) from error
            logger.warning("%s; passed over", text)

    def _refuse_if_damaged(self) -> None:
        if steps := self._all_steps():
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (steps {', '.join(map(str, steps))}); "
                "nothing was changed: remove or rename the folder to start anew"
            )

    def _all_steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if re.fullmatch(r"\d{8,}", path.name))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _sums(self, step: int) -> dict[str, str]:
        """The digests as written, {file: sha256}."""
        try:
            *lines, rest = (self._path(step) / SUMS).read_bytes().decode().split("\n")
        except FileNotFoundError:
            raise DamagedError(f"{SUMS} is missing") from None
        except UnicodeDecodeError:
            raise DamagedError(f"{SUMS} is not text") from None
        if rest:
            raise DamagedError(f"{SUMS} is cut short")
        sums = {}
        for number, line in enumerate(lines, 1):
            match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
            if not match:
                raise DamagedError(f"line {number} of {SUMS} is not a digest and a name")
            sums[match[2]] = match[1]
        return sums

    def _whole(self, step: int, accept: Callable[[int, dict[str, Any]], None]) -> dict[str, Any]:
        """The record of a checkpoint that is whole. Raises DamagedError, on all processes, where one finds damage."""
        damage, record = None, {}
        try:
            sums = self._sums(step)
            record = self._record(step, sums)
            accept(step, record["meta"])
            self._verify(step, sums)
        except (DamagedError, OSError) as error:
            damage = error
        said = self._read_together.exchange(None if damage is None else reason(damage))
        if damage is not None:
            raise damage
        for index, text in enumerate(said):
            if text is not None:
                raise DamagedError(f"{text} (as process {index} sees it)")
        return record

    def _verify(self, step: int, sums: Mapping[str, str]) -> None:
        """Compares every file with its digest, or a share of them, of several processes. Only files found by walking
        are ever opened."""
        path = self._path(step)
        found = files(path)
        for name in sums:
            if name not in found:
                raise DamagedError(f"{name} is missing")
        for place, name in enumerate(found):
            if name not in sums:
                raise DamagedError(f"{name} is not listed in {SUMS}")
            if place % processes.count() == processes.index() and digest(path / name) != sums[name]:
                raise DamagedError(f"{name} differs from its digest in {SUMS}")

    def _record(self, step: int, sums: Mapping[str, str]) -> dict[str, Any]:
        path = self._path(step) / META
        if META not in sums or not path.is_file():
            raise DamagedError(f"{META} is missing")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sums[META]:
            raise DamagedError(f"{META} differs from its digest in {SUMS}")
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            raise DamagedError(f"{META} is not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("meta"), dict) or "format" not in record:
            raise DamagedError(f"{META} is no record")
        if record.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {record.get('format')}; this version reads format {FORMAT}")
        _shapes(record)
        return record

    def _metric(self, step: int) -> float | None:
        try:
            metric = self._record(step, self._sums(step)).get("metric")
        except (DamagedError, CheckpointError, OSError):
            return None
        return metric if isinstance(metric, int | float) else None

    def _compare(self, step: int, saved: dict[str, dict[str, Any]], like: Mapping[str, Mapping[str, Any]]) -> None:
        start = f"checkpoint of step {step} in {self.folder} is of another model: "
        differences = []
        for group, named in like.items():
            if group not in saved:
                raise CheckpointError(f"{start}it has no {group!r} (it has {', '.join(map(repr, saved))})")
            here, there = {name: _describe(x) for name, x in named.items()}, saved[group]
            for name in (*here, *(name for name in there if name not in here)):
                if here.get(name) != there.get(name):
                    differences.append(
                        f"{group} {name!r} is {_show(there.get(name))} there and {_show(here.get(name))} here"
                    )
        if differences:
            more = len(differences) - 1
            raise CheckpointError(start + differences[0] + f" (and {more} more such arrays)" * (more > 0))

    def _read(self, step: int, like: Mapping[str, Mapping[str, Any]]) -> Arrays:
        import orbax.checkpoint as ocp

        wanted = {
            group: {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)) for name, x in named.items()}
            for group, named in like.items()
        }
        stored = _without_empty(wanted)
        found: Arrays = {}
        if stored:
            restore_args = ocp.checkpoint_utils.construct_restore_args(stored)
            try:
                found = self._checkpointer().restore(
                    self._path(step) / ARRAYS,
                    args=ocp.args.PyTreeRestore(item=stored, restore_args=restore_args, partial_restore=True),
                )
            except Exception as error:  # its digests are right, so an earlier checkpoint would fare no better
                raise CheckpointError(
                    f"checkpoint of step {step} in {self.folder} is whole but could not be read: {reason(error)}"
                ) from error
        return {
            group: {name: found[group][name] if _size(x) else _empty(x) for name, x in named.items()}
            for group, named in wanted.items()
        }


def _shapes(record: dict[str, Any]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The arrays that a record describes. Raises DamagedError if it describes none."""
    try:
        return {
            group: {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in named.items()}
            for group, named in record["arrays"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError):
        raise DamagedError(f"{META} does not say what its arrays are") from None


def _describe(x: Any) -> list[Any]:
    return [str(x.dtype), list(x.shape)]


def _show(description: list[Any] | None) -> str:
    return f"{description[0]}[{','.join(map(str, description[1]))}]" if description else "absent"


def _size(x: Any) -> int:
    return math.prod(x.shape)


def _sharding(x: Any) -> jax.sharding.Sharding:
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _empty(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.numpy.zeros(x.shape, x.dtype, device=x.sharding)


def _without_empty(arrays: Mapping[str, Mapping[str, Any]]) -> Arrays:
    full = {group: {name: x for name, x in named.items() if _size(x)} for group, named in arrays.items()}
    return {group: named for group, named in full.items() if named}

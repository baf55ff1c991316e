"""The lock that keeps a run folder to one process."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training import processes
from training.checkpoint import CheckpointError, reason

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0  # how often a running process touches its lock
SILENCE_SECONDS = 60.0  # after this long without a touch, the lock of a process on another host is stale


class RunLock:
    """Keeps a run folder to one process: `with RunLock(folder): ...`.

    The file `lock` in the folder names the holder and is touched every 15 s while it lives. A second process is refused
    with CheckpointError naming pid and host. What a killed process left is recovered: on the same host at once,
    from another host (a shared disk) after a minute without a touch.
    """

    _held: set[Path] = set()  # by this process

    def __init__(self, folder: Path | str):
        self.path = Path(folder).absolute() / "lock"
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._exclusive() as file:
                holder = _parse(file.read())
                if holder and (seen := self._alive(holder)):
                    raise CheckpointError(
                        f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']} ({seen}); "
                        "stop it first, or choose another folder"
                    )
                if holder:
                    logger.warning(
                        "process %s on %s, which used %s, is gone; taking over",
                        holder["pid"], holder["host"], self.path.parent,
                    )  # fmt: skip
                self._write(file, json.dumps(_myself()))
        except OSError as error:
            raise CheckpointError(f"cannot lock {self.path.parent}: {reason(error)}") from error
        self._held.add(self.path)
        self._over.clear()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()
        processes.farewell(self.__exit__)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._held.discard(self.path)
        with contextlib.suppress(OSError), self._exclusive() as file:  # a vanished folder is no reason to fail
            if _parse(file.read()) == _myself():
                self._write(file, "")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[Any]:
        """The file, opened; two processes never read and write it at the same time."""
        with open(self.path, "a+") as file:  # never deleted: a lock on a deleted file would guard nothing
            with contextlib.suppress(OSError):  # some network disks have no flock; the content decides either way
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    @staticmethod
    def _write(file: Any, text: str) -> None:
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()

    def _alive(self, holder: dict[str, Any]) -> str:
        """How the holder is known to live, or "" if it does not."""
        if holder["host"] != socket.gethostname():
            before = self.path.stat().st_mtime
            self.path.touch()  # the time by the disk's own clock, which may not be ours
            silence = self.path.stat().st_mtime - before
            os.utime(self.path, (before, before))
            return f"seen {silence:.0f} s ago; its lock ends after {SILENCE_SECONDS:.0f} s of silence" * (
                silence < SILENCE_SECONDS
            )
        if holder["pid"] == os.getpid():
            return "this process" if self.path in self._held else ""
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass  # another user's
        return "running" if holder["born"] == _born(holder["pid"]) else ""

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "born": _born(os.getpid())}


def _born(pid: int) -> str:
    """When a process started, in ticks since boot: tells a reused pid. "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "born": str(holder["born"])}
    except (ValueError, KeyError, TypeError):
        return None  # empty, or cut short by a crash

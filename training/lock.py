"""The lock that keeps a run folder to one process."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
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
    with CheckpointError naming pid and host. What a killed process left is recovered: on the same host at once, from
    another one (a shared disk, another container) when a minute has passed without a touch, which is waited for.

    A holder that stood still for that minute finds the lock another's: it then ends itself with a line, exit status 2.
    Ask `lost` before anything that cannot be undone.
    """

    _held: set[Path] = set()  # by this process

    def __init__(self, folder: Path | str):
        self.path = Path(folder).absolute() / "lock"
        self._me = _myself()
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
                self._write(file, json.dumps(self._me))
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
            if _parse(file.read()) == self._me:
                self._write(file, "")

    def lost(self) -> str:
        """Who has the folder now instead of this process, for a person; "" where it is still ours."""
        try:
            holder = _parse(self.path.read_text(errors="replace"))
        except OSError:  # a disk that does not answer says nothing
            return ""
        if holder == self._me or self._over.is_set():
            return ""
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return f"{self.path.parent} was taken over by {who} while this one stood still"

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
        if any(holder[name] != value for name, value in _here().items()):  # where its pid means nothing to us
            return "touching its lock" if self._touched(holder) else ""
        if holder["pid"] == os.getpid():
            return "this process" if self.path in self._held else ""
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass  # another user's
        return "running" if holder["born"] == _born(holder["pid"]) else ""

    def _touched(self, holder: dict[str, Any]) -> bool:
        """Whether the holder touches the lock before it has been silent for too long."""
        before = self.path.stat().st_mtime_ns
        self.path.touch()  # the time by the disk's own clock, which may not be ours
        left = SILENCE_SECONDS - (self.path.stat().st_mtime_ns - before) / 1e9
        os.utime(self.path, ns=(before, before))
        if left <= 0:
            return False
        logger.warning(
            "process %s on %s used %s less than %.0f s ago: waiting to see whether it lives",
            holder["pid"], holder["host"], self.path.parent, SILENCE_SECONDS,
        )  # fmt: skip
        before, until = self.path.stat().st_mtime_ns, time.monotonic() + min(left, SILENCE_SECONDS)
        while time.monotonic() < until:
            time.sleep(SILENCE_SECONDS / 60)
            if self.path.stat().st_mtime_ns != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            if lost := self.lost():
                error = CheckpointError(f"{lost}: nothing more is written here")
                processes.end(processes.failed(error, error, 2))
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "born": _born(os.getpid()), **_here()}


def _here() -> dict[str, str]:
    """Where pids mean what they mean to this process: two containers, or two hosts, may have one name."""
    return {"host": socket.gethostname(), "boot": _boot(), "pids": _pids()}


def _boot() -> str:
    """A name of this start of the machine; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pids() -> str:
    """A name of the namespace of this process's pid; "" where the system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in ticks since boot: tells a reused pid. "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
        return {"pid": int(holder["pid"])} | {name: str(holder.get(name, "")) for name in ("born", *_here())}
    except (ValueError, KeyError, TypeError):
        return None  # empty, or cut short by a crash

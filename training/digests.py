"""The files of a checkpoint, their digests, and what is said of one that is damaged."""

import hashlib
import os
import re
from pathlib import Path

META = "meta.json"
ARRAYS = "arrays"


class DamagedError(Exception):
    """One checkpoint is not whole: the text names the file and what is wrong with it."""


def reason(error: BaseException) -> str:
    """One short line for a person, whatever the library said."""
    text = str(error)
    if isinstance(error, DamagedError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if code := re.search(r"os_error_code='(\d+)'", text):  # tensorstore's way to pass on an errno
        return os.strerror(int(code[1]))
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first[:200]}"


def files(folder: Path, process: int | None = None) -> list[str]:
    """The files a checkpoint consists of, relative to its folder.

    process: only those that it wrote. What bears no process in its name, the first one wrote.
    """
    names = [META] if (folder / META).exists() else []
    for path in sorted((folder / ARRAYS).rglob("*")):
        if path.is_symlink():
            raise DamagedError(f"{path.relative_to(folder)} is a link")
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return [name for name in names if process in (None, _writer(name))]


def _writer(name: str) -> int:
    own = re.match(rf"{ARRAYS}/(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/|$)", name)
    return int(own[1]) if own else 0


def digest(path: Path, *, on_disk: bool = False) -> str:
    """Its sha256. on_disk: see to it first that the file is there."""
    with open(path, "rb") as file:
        if on_disk:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

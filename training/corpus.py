"""Documents: where text comes from, one (name, text) at a time, and always in the same order.

A source is `stdlib` (the running interpreter's own sources: real text on every machine), `wheels` (the sources of the
pinned packages: the same bytes on every machine) or a path: a file, a folder or a glob of plain text, JSON lines,
Parquet or ArrayRecord.
"""

import dataclasses
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from training.data import DataError

TEXT = frozenset(
    "txt md rst tex html xml css csv tsv json toml yaml yml ini cfg sql sh py pyi js ts c h cc cpp hpp rs go".split()
)
ROWS = frozenset({"jsonl", "parquet", "arrayrecord", "array_record"})
WHEELS = ("chex", "einops", "flax", "grain", "jax", "numpy", "optax", "orbax")
# Tests are another kind of text, and installed packages differ from machine to machine.
LEFT_OUT = frozenset("test tests idlelib idle_test lib2to3 site-packages dist-packages __pycache__".split())
ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a source.

    description: for people, e.g. "stdlib of CPython 3.12.1".
    files: (name, path) pairs in the order they are read; a name does not depend on the machine.
    text_field: where rows (JSON lines, Parquet, ArrayRecord) keep their text.
    """

    description: str
    files: tuple[tuple[str, Path], ...]
    text_field: str = "text"

    @property
    def bytes(self) -> int | None:
        """Bytes that `documents` will report, for a progress bar; None where only reading them tells."""
        if any(_kind(path) == "parquet" for _, path in self.files):
            return None
        return sum(path.stat().st_size for _, path in self.files)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or written to. Cheap: no file is read."""
        stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self.files]
        return hashlib.sha256(json.dumps([self.text_field, stats]).encode()).hexdigest()

    def documents(self, read: Callable[[int], object] = lambda _: None) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of every document that is not empty; calls `read` with the bytes each one took."""
        for name, path in self.files:
            rows = {"jsonl": _json_lines, "parquet": _parquet, "arrayrecord": _array_record}.get(_kind(path))
            try:
                if rows is None:
                    data = path.read_bytes()
                    read(len(data))
                    if data:
                        # Undecodable bytes become U+FFFD: one bad byte does not cost a file.
                        yield name, data.decode("utf-8", errors="replace")
                else:
                    for row, (text, size) in enumerate(rows(path, self.text_field)):
                        read(size)
                        if text:
                            yield f"{name}:{row}", text
            except OSError as error:
                raise _unreadable(path, error) from None


def open_corpus(source: str, text_field: str = "text") -> Corpus:
    """The corpus that `source` names. Raises DataError, one line, where there is nothing to read."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        name = f"stdlib of {platform.python_implementation()} {platform.python_version()}"
        return _found(Corpus(name, tuple(_sources(root, root))), source)
    if source == "wheels":
        sources: list[tuple[str, Path]] = []
        versions = []
        for package in WHEELS:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise DataError(f"Text.source is 'wheels', but {package} is not installed; install it or choose stdlib")
            for folder in map(Path, spec.submodule_search_locations or ()):
                sources += _sources(folder, folder.parent)
            versions.append(f"{package} {_version(package)}")
        return _found(Corpus("wheels: " + ", ".join(versions), tuple(sorted(sources))), source)

    path = Path(source).expanduser()
    if path.is_dir():
        paths = [p for p in path.rglob("*") if p.is_file() and _suffix(p) in TEXT | ROWS]
        files = [(p.relative_to(path).as_posix(), p) for p in paths if not _hidden(p.relative_to(path))]
    elif path.is_file():
        files = [(path.name, path)]
    elif glob.has_magic(source):
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        root = next(p for p in path.parents if not glob.has_magic(str(p)))
        files = [(p.relative_to(root).as_posix(), p) for p in paths]
    else:
        raise DataError(f"Text.source is {source!r}: no such file or folder; give stdlib, wheels, a path or a glob")
    for _, p in files:
        _kind(p)
    return _found(Corpus(source, tuple(sorted(files)), text_field), source)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"Text.source: cannot read {path} ({error.strerror or error}); check it or leave it out")


def _found(corpus: Corpus, source: str) -> Corpus:
    try:
        size = corpus.bytes
    except OSError as error:
        raise _unreadable(Path(error.filename or source), error) from None
    if size == 0:
        known = " ".join("." + suffix for suffix in sorted(ROWS | {"txt", "md", "py"}))
        raise DataError(f"Text.source is {source!r}: an empty corpus; give a source with files such as {known}")
    return corpus


def _sources(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Python sources under `folder`, named and sorted by their place under `root`."""
    found = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(root)
        # _sysconfigdata and config-* are written when an interpreter is built: the machine's paths, not text.
        if not LEFT_OUT.intersection(name.parts) and not name.parts[0].startswith(("_sysconfigdata", "config-")):
            found.append((name.as_posix(), path))
    return iter(sorted(found))


def _version(package: str) -> str:
    distribution = {"orbax": "orbax-checkpoint"}.get(package, package)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _suffix(path: Path) -> str:
    return path.suffix[1:].lower()


def _kind(path: Path) -> str:
    """How to read a file: "jsonl", "parquet", "arrayrecord", or "text", if its extension or its content says so."""
    suffix = _suffix(path)
    if suffix in ROWS:
        return suffix.replace("_", "")
    if suffix not in TEXT:
        try:
            with path.open("rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise _unreadable(path, error) from None
        if not _is_text(head):
            known = ", ".join("." + s for s in sorted(ROWS))
            raise DataError(f"Text.source: {path.name} is not text and its extension is unknown; give text or {known}")
    return "text"


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last character is only cut
            return False
    return b"\0" not in head


def _field(row: object, field: str, where: str) -> str:
    """The text of a row, or DataError with the fields that it has."""
    if not isinstance(row, dict):
        raise DataError(f"Text.source: {where} is not a JSON object; write one object with a field {field!r} a line")
    if field not in row:
        raise DataError(f"Text.text_field is {field!r}, but {where} has the fields {sorted(row)}; name one of them")
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise DataError(f"Text.text_field is {field!r}, but that is of type {kind} in {where}; name a field of text")
    return row[field]


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"Text.source: {where} is not JSON ({error}); write one object a line") from None
                yield _field(row, field, where), len(line)


def _parquet(path: Path, field: str) -> Iterator[tuple[str, int]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise DataError(f"Text.source: reading {path.name} needs pyarrow; run: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"Text.source: {path.name} is not a Parquet file ({error}); check it") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(f"Text.text_field is {field!r}, but {path.name} has the fields {names}; name one of them")
        for rows in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[field]):
            for text in rows.column(0).to_pylist():
                if text is not None:
                    yield _field({field: text}, field, path.name), len(text)


def _array_record(path: Path, field: str) -> Iterator[tuple[str, int]]:
    """Records are UTF-8 text, or JSON objects that hold it in `field`."""
    for number, record in enumerate(_records(path)):
        where = f"{path.name}, record {number}"
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"Text.source: {where} is not UTF-8; write records of text or JSON") from None
        if text.startswith("{"):
            try:
                row = json.loads(text)
            except ValueError:
                pass  # text that happens to start with a brace
            else:
                text = _field(row, field, where)
        yield text, len(record)


def _records(path: Path) -> Iterator[bytes]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise DataError(f"Text.source: reading {path.name} needs array_record; run: pip install array_record") from None
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        for first in range(0, count, ROWS_AT_ONCE):
            yield from reader.read(first, min(first + ROWS_AT_ONCE, count))
        reader.close()  # what was wrong with the file is only said here: until then it seems to be empty
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"Text.source: {path.name} is not an ArrayRecord file ({reason}); check it") from None

"""The token store: a source's documents as tokens on disk, written once, memory-mapped ever after.

    FOLDER/manifest.json                counts, digests of the files, tokenizer, source
           {train,held_out}.tokens      little-endian uint16, or uint32 for vocabularies above 65,536
           {train,held_out}.offsets.npy int64 [documents + 1]: where each document starts, with its document-start token
           {train,held_out}.text        the first 32 MiB of the text, for the references
           tokenizer.json               unless the tokens are bytes

A store is written to a temporary folder and renamed into place: it is there whole or not at all, and any number of
processes may prepare the same one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.corpus import Corpus, open_corpus
from training.data import DataError, Text
from training.references import references
from training.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, open_tokenizer

VERSION = 1
MANIFEST = "manifest.json"
REFERENCES = "references.json"
SPLITS = ("train", "held_out")
DEFAULT_ROOT = Path(__file__).resolve().parent.parent / ".cache" / "data"
SAMPLE_BYTES = 32 << 20
# A store up to this size is read once, whole, when it is opened; of a larger one only the sizes are compared.
VERIFIED_BYTES = 1 << 30
GROUP_BYTES = 4 << 20

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Store:
    """A prepared source. train, held_out: [tokens] unsigned integers, mapped from disk and read-only."""

    folder: Path
    manifest: dict[str, Any]
    train: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer

    @property
    def digest(self) -> str:
        """sha256 of all that batches are made of: the same text and tokenizer give the same on every machine."""
        return self.manifest["digest"]

    def offsets(self, split: str) -> np.ndarray:
        """int64 [documents + 1]: document n of a split is tokens[offsets[n] : offsets[n + 1]]."""
        return np.load(self.folder / f"{split}.offsets.npy", mmap_mode="r", allow_pickle=False)

    def references(self) -> dict[str, float]:
        """`training.references.references` of the text (its first 32 MiB), computed once and kept in the store."""
        path = self.folder / REFERENCES
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            if kept["digest"] == self.digest:
                return kept["bits_per_byte"]
        train, held_out = ((self.folder / f"{split}.text").read_bytes() for split in SPLITS)
        values = references(train, held_out)
        with contextlib.suppress(OSError):  # a store may be read-only
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps({"digest": self.digest, "bits_per_byte": values}))
            part.replace(path)
        return values


def prepare(config: Text) -> Store:
    """The store of `config`: found and verified, or written. Raises DataError, one line, where that cannot be."""
    source = Path(config.source).expanduser()
    if (source / MANIFEST).is_file():
        store = open_store(source)
        if config.tokenizer != "bytes" and open_tokenizer(config.tokenizer).digest != store.tokenizer.digest:
            own = store.tokenizer.name
            raise DataError(f"Text.tokenizer is {config.tokenizer!r}, but the store has its own, {own!r}; leave it out")
        return store

    corpus = open_corpus(config.source, config.text_field)
    tokenizer = open_tokenizer(config.tokenizer)
    root = Path(config.store).expanduser() if config.store else DEFAULT_ROOT
    key = _digest([VERSION, corpus.fingerprint(), tokenizer.digest, config.held_out])
    label = re.sub(r"[^A-Za-z0-9]+", "-", source.stem).strip("-") or "files"
    folder = root / f"{label}-{key[:16]}"
    if folder.exists():
        try:
            return open_store(folder)
        except DataError as error:
            log.warning("%s: preparing it again", error)
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        _write(temporary, corpus, tokenizer, config.held_out)
        store = open_store(temporary)
        _move(temporary, folder)
        return dataclasses.replace(store, folder=folder)  # its maps stay valid: files are renamed, not rewritten
    except OSError as error:
        where = error.filename or root
        reason = error.strerror or error
        raise DataError(f"Text.store: cannot write {where} ({reason}); make room or give another folder") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def open_store(folder: Path) -> Store:
    """A store that is whole. Raises DataError, one line, for one that is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            raise ValueError(f"it has version {manifest['version']}, this program reads {VERSION}")
        files = manifest["files"]
        if manifest["digest"] != _store_digest(manifest):
            raise ValueError(f"{MANIFEST} was changed")
        whole = sum(file["bytes"] for file in files.values()) <= VERIFIED_BYTES
        for name, file in files.items():
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes instead of {file['bytes']:,}")
            if whole:
                with (folder / name).open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                        raise ValueError(f"{name} does not match its digest")
        train, held_out = (_map(folder / f"{split}.tokens", manifest["dtype"]) for split in SPLITS)
        spec = manifest["tokenizer"]
        byte = spec["digest"] == ByteTokenizer.digest
        tokenizer = ByteTokenizer() if byte else FileTokenizer(folder / "tokenizer.json", spec["name"])
        return Store(folder, manifest, train, held_out, tokenizer)
    except OSError as error:
        reason = f"{Path(error.filename or folder).name}: {error.strerror}"
    except KeyError as error:
        reason = f"{MANIFEST} lacks {error}"
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error)
    raise DataError(f"the token store {folder} is damaged ({reason})")


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _store_digest(manifest: dict[str, Any]) -> str:
    """Leaves out how the source is called: that may differ from machine to machine."""
    tokenizer = {field: value for field, value in manifest["tokenizer"].items() if field != "name"}
    return _digest([manifest["version"], manifest["dtype"], tokenizer, manifest["splits"], manifest["files"]])


def _move(temporary: Path, folder: Path) -> None:
    """Renames a whole store into place. Another's is left there if it is whole, and makes room if it is not."""
    try:
        temporary.rename(folder)
    except OSError:
        try:
            open_store(folder)
        except DataError:
            broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=folder.parent))
            with contextlib.suppress(OSError):  # someone else may be mending it too, with the same content
                folder.rename(broken / "store")
                temporary.rename(folder)
            shutil.rmtree(broken, ignore_errors=True)


Assign = Callable[[str, str], list[tuple[str, str]]]


def _place(name: str) -> float:
    """Where a document stands in [0, 1), by its name: held out are those below the fraction asked for.

    The prefix picks one of many equally fair draws: with it, the held-out standard library has the mix of code, tables
    and prose of the whole, where others hand most of it to one file.
    """
    return int.from_bytes(hashlib.sha256(f"held out/{name}".encode()).digest()[:8], "big") / 2**64


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, held_out: float) -> None:
    """Writes all files of a store into `folder`."""
    seen: list[str] = []  # the document with the lowest place

    def by_name(name: str, text: str) -> list[tuple[str, str]]:
        seen[:] = [min([*seen, name], key=_place)]
        return [("held_out" if _place(name) < held_out else "train", text)]

    def lowest(name: str, text: str) -> list[tuple[str, str]]:
        return [("held_out" if name == seen[0] else "train", text)]

    def tail(_: str, text: str) -> list[tuple[str, str]]:
        cut = text.rfind("\n", 0, int(len(text) * (1 - held_out))) + 1 or int(len(text) * (1 - held_out))
        return [("train", text[:cut]), ("held_out", text[cut:])]

    splits, files = _write_splits(folder, corpus, tokenizer, by_name)
    counts = [split["documents"] for split in splits.values()]
    if held_out and min(counts) == 0 and sum(counts) > 0:
        # Too few documents for chance to part them: the one lowest in place is held out, of a single one its end.
        splits, files = _write_splits(folder, corpus, tokenizer, lowest if sum(counts) > 1 else tail)
    if splits["train"]["tokens"] == 0:
        raise DataError(f"Text.source is {corpus.description!r}: an empty corpus, no document holds text; give another")

    if isinstance(tokenizer, FileTokenizer):
        (folder / "tokenizer.json").write_bytes(tokenizer.text)
        files["tokenizer.json"] = {"bytes": len(tokenizer.text), "sha256": hashlib.sha256(tokenizer.text).hexdigest()}
    for name, split in splits.items():
        spelt, size = split.pop("token_bytes"), split["bytes"]
        if abs(spelt - size) > 0.01 * size:
            message = "Text.tokenizer %s: the %s tokens spell %.0f%% of the text; bits per byte will be off by as much"
            log.warning(message, tokenizer.name, name, 100 * spelt / size)
    manifest = {
        "version": VERSION,
        "source": corpus.description,
        "tokenizer": {field: getattr(tokenizer, field) for field in ("name", "digest", "words", "doc_start")},
        "fraction_held_out": held_out,
        "dtype": _dtype(tokenizer).str,
        "splits": splits,
        "files": files,
    }
    manifest["digest"] = _store_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.words <= 1 << 16 else "<u4")


def _write_splits(folder: Path, corpus: Corpus, tokenizer: Tokenizer, assign: Assign) -> tuple[dict, dict]:
    """Returns, by name, the counts of each split and the size and digest of each file."""
    with contextlib.ExitStack() as stack:
        writers = {split: _Writer(folder, split, tokenizer, stack) for split in SPLITS}
        for name, text in corpus.documents(stack.enter_context(_progress(corpus))):
            for split, part in assign(name, text):
                writers[split].add(part)
        files = [file for writer in writers.values() for file in writer.finish()]
    counts = {split: writer.counts for split, writer in writers.items()}
    return counts, {file.path.name: {"bytes": file.size, "sha256": file.hash.hexdigest()} for file in files}


class _Writer:
    """Writes the documents of one split, encoding them in groups. Its files are closed by `stack`."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, stack: contextlib.ExitStack):
        self.tokenizer = tokenizer
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0, "token_bytes": 0}
        self._texts: list[str] = []
        self._waiting = 0
        self._offsets = array("q", [0])
        names = ("tokens", "text", "offsets.npy")
        self._files = [stack.enter_context(_Hashed(folder / f"{split}.{name}")) for name in names]
        self._tokens, self._sample, self._starts = self._files

    def finish(self) -> "list[_Hashed]":
        """Writes what is left; returns the files."""
        self._flush()
        np.lib.format.write_array(self._starts, np.asarray(self._offsets, "<i8"), allow_pickle=False)
        return self._files

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._waiting += len(text)
        if self._waiting >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        start = np.asarray([self.tokenizer.doc_start], _dtype(self.tokenizer))
        encoded = [ids.astype(start.dtype) for ids in self.tokenizer.encode(self._texts)]
        for ids in encoded:
            self._offsets.append(self._offsets[-1] + len(ids) + 1)
            self.counts["token_bytes"] += int(self.tokenizer.token_bytes_W[ids].sum())
        self._tokens.write(np.concatenate([part for ids in encoded for part in (start, ids)]).tobytes())
        text = "".join(self._texts).encode("utf-8", errors="replace")
        self._sample.write(text[: max(0, SAMPLE_BYTES - self._sample.size)])
        self.counts["documents"] += len(self._texts)
        self.counts["tokens"] = self._offsets[-1]
        self.counts["bytes"] += len(text)
        self._texts, self._waiting = [], 0


class _Hashed:
    """A file that knows its size and digest while it is written."""

    def __init__(self, path: Path):
        self.path, self.hash, self.size = path, hashlib.sha256(), 0
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


@contextlib.contextmanager
def _progress(corpus: Corpus) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes read, where someone is looking at one."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"preparing {corpus.description[:40]}", total=corpus.bytes)
        yield lambda size: bar.advance(task, size)

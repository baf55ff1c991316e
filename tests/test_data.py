"""Data: batches are a pure function of (seed, step), documents never leak into each other, stores survive damage."""

import json
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import store as stores
from training.data import DataConfig, DataError, Text
from training.references import references

T, B = 16, 4
LINES = [f"line {n} of the document says {n * n} and more\n" for n in range(40)]


def write_documents(folder: Path, count: int = 30) -> dict[str, str]:
    """A folder of texts of several lengths, some shorter than T, one of more than a byte a character."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {f"{n:02}.txt": "".join(LINES[: 1 + n % 7])[n:] for n in range(count)}
    documents["00.txt"] = "a"
    documents["01.txt"] = "naïve café, 漢字"
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return documents


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder)
    return folder


@pytest.fixture(scope="module")
def text(source, tmp_path_factory):
    """Makes a Text over the documents, all in one folder of stores."""
    root = tmp_path_factory.mktemp("stores")

    def make(**fields) -> Text:
        return Text(**{"T": T, "B": B, "source": str(source), "store": str(root), "held_out": 0.2, **fields})

    return make


def split_documents(dataset, split: str) -> list[list[int]]:
    tokens, offsets = getattr(dataset.store, split).tolist(), dataset.store.offsets(split).tolist()
    return [tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def expected_rows(documents: list[list[int]], ring: bool, T: int = T) -> list[tuple[list[int], list[int], list[int]]]:
    """Windows in order, token by token from the definition: (ids, pos, labels) of each row."""
    stream = [(document, place) for document in documents for place in range(len(document))]
    count = len(stream) // T if ring else -(-len(stream) // T)
    rows = []
    for window in range(count):
        ids, pos, labels = [], [], []
        first = window * T
        for n in range(first, first + T):
            if n >= len(stream) and not ring:
                token, at, label = 0, -1, -100
            else:
                document, place = stream[n]
                token, at = document[place], min(place, n - first)
                label = document[place + 1] if place + 1 < len(document) else -100
            ids.append(token)
            pos.append(at)
            labels.append(label)
        rows.append((ids, pos, labels))
    return rows


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_windows_in_order_equal_the_definition(text):
    dataset = text(shuffle=False).build()
    expected = expected_rows(split_documents(dataset, "train"), ring=True)
    assert len(expected) > 3 * B
    data = dataset.train(seed=0)
    for step in range(len(expected) // B + 2):  # past the end of the epoch
        batch = data[step]
        assert all(a.shape == (B, T) and a.dtype == np.int32 for a in batch[:3])
        for row in range(B):
            assert tuple(a[row].tolist() for a in batch[:3]) == expected[(step * B + row) % len(expected)]


@pytest.mark.parametrize("T", [15, 16])
def test_held_out_windows_equal_the_definition(text, T):
    dataset = text(T=T).build()
    expected = expected_rows(split_documents(dataset, "held_out"), ring=False, T=T)
    rows = [tuple(a[row].tolist() for a in batch[:3]) for batch in dataset.held_out() for row in range(B)]
    assert rows[: len(expected)] == expected
    assert all(set(pos) == {-1} and set(labels) == {-100} for _, pos, labels in rows[len(expected) :])
    assert any(-1 in pos and 0 in pos for _, pos, _ in rows) == bool(len(dataset.store.held_out) % T)
    # Every token but the document starts is asked for exactly once.
    asked = sum(label >= 0 for _, _, labels in rows for label in labels)
    assert asked == sum(len(document) - 1 for document in split_documents(dataset, "held_out"))


def test_fewer_held_out_batches_are_spread_and_rows_unite(text):
    dataset = text().build()
    whole = list(dataset.held_out())
    few = list(dataset.held_out(2))
    assert len(whole) > 3
    assert same(few[0], whole[0]) and same(few[1], whole[len(whole) // 2])
    halves = zip(dataset.held_out(rows=slice(0, 1)), dataset.held_out(rows=slice(1, None)), strict=True)
    for batch, (a, b) in zip(whole, halves, strict=True):
        assert same(batch, [np.concatenate(pair) for pair in zip(a[:3], b[:3], strict=True)])
    assert len(list(dataset.held_out(10**6))) == len(whole)


def test_batches_are_a_pure_function_of_seed_and_step(text):
    steps = [7, 0, 3, 10**6, 2**40 - 1, 7]
    a, b = text().build().train(5), text().build().train(5)
    b[1]  # what was read before does not matter
    first = {step: a[step] for step in steps}
    assert all(same(first[step], b[step]) for step in reversed(steps))
    assert len(a) == 2**40
    assert not same(a[0], text().build().train(6)[0])
    assert not same(a[0], a[1])
    iterator = iter(a.to_iter_dataset())
    next(iterator)
    state = iterator.get_state()
    batch = next(iterator)
    iterator.set_state(state)
    assert same(batch, next(iterator)) and same(batch, a[1])


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_any_number_of_processes_reads_the_global_batch(text, pieces):
    dataset = text().build()
    whole = dataset.train(3)
    shares = [dataset.train(3, rows=slice(n * B // pieces, (n + 1) * B // pieces)) for n in range(pieces)]
    for step in (0, 11):
        assert same(whole[step], [np.concatenate(parts) for parts in zip(*(s[step][:3] for s in shares), strict=True)])
    assert same(dataset.train(3, rows=slice(1, None, 2))[2], [a[1::2] for a in whole[2][:3]])


def test_each_epoch_reads_every_window_once_from_a_phase_of_its_own(text, tmp_path):
    unique = tmp_path / "unique.txt"  # any T tokens are found at one place only
    unique.write_text("".join(f"{n * n:x}-{n:x}\n" for n in range(200)))
    dataset = text(B=1, source=str(unique)).build()
    ring, windows = dataset.store.train.tolist(), len(dataset.store.train) // T
    places = {tuple((ring + ring)[n : n + T]): n for n in range(len(ring))}
    assert len(places) == len(ring)
    epochs = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        data = dataset.train(seed)
        starts = [places[tuple(data[epoch * windows + n].ids_BT[0].tolist())] for n in range(windows)]
        read = np.bincount((np.asarray(starts)[:, None] + np.arange(T)).ravel() % len(ring), minlength=len(ring))
        assert read.max() == 1 and read.sum() == windows * T
        assert np.count_nonzero(np.diff(starts) == T) < windows / 2, "windows come in the order of the text"
        epochs.append((starts[0] % T, starts))
    assert len({tuple(starts) for _, starts in epochs}) == 4
    orders = {tuple(np.diff(starts)) for _, starts in epochs}
    assert len(orders) == 4, "an epoch repeats the order of another, shifted"
    assert len({phase for phase, _ in epochs}) > 1


def test_byte_tokens_and_split(text, source):
    dataset = text().build()
    assert (dataset.words, dataset.doc_start, dataset.labelled) == (257, 256, None)
    assert dataset.token_bytes.dtype == np.int32 and dataset.token_bytes.tolist() == [1] * 256 + [0]
    sample = "def f(x): return 'naïve 漢字'\n"
    assert dataset.decode(np.append(dataset.encode(sample), 256)) == sample
    assert dataset.encode(sample).dtype == np.int32
    train, held_out = (split_documents(dataset, split) for split in stores.SPLITS)
    assert all(document[0] == 256 and 256 not in document[1:] for document in train + held_out)
    found = sorted(dataset.decode(np.asarray(document)) for document in train + held_out)
    assert found == sorted(path.read_text(encoding="utf-8") for path in source.iterdir())
    assert 0 < len(held_out) < len(train)
    # The split goes by name: a document stays on its side when others come and go.
    other = Text(T=T, B=B, source=str(source / "[01]*.txt"), store=text().store, held_out=0.2).build()
    smaller = {tuple(document) for document in split_documents(other, "held_out")}
    assert smaller and smaller <= {tuple(document) for document in held_out}


def test_digest_names_the_content(text, source, tmp_path):
    digest = text().build().digest
    copy = tmp_path / "elsewhere"
    write_documents(copy)
    assert text(source=str(copy)).build().digest == digest
    (copy / "03.txt").write_text("changed", encoding="utf-8")
    changed = text(source=str(copy)).build().digest
    assert changed != digest
    (copy / "03.txt").write_text("chanced", encoding="utf-8")  # of the same size
    assert text(source=str(copy)).build().digest not in (digest, changed)
    assert text(held_out=0.5).build().digest != digest


def test_few_documents_still_hold_something_out(tmp_path, text):
    write_documents(tmp_path / "two", 2)
    (tmp_path / "two" / "01.txt").write_text("".join(LINES), encoding="utf-8")
    two = text(source=str(tmp_path / "two"), T=1, held_out=1e-9).build().store.manifest["splits"]
    assert [split["documents"] for split in two.values()] == [1, 1]
    one = tmp_path / "one.log"  # an extension of no meaning here: it reads as text
    one.write_text("".join(LINES), encoding="utf-8")
    dataset = text(source=str(one)).build()
    train, held_out = (dataset.decode(getattr(dataset.store, split)) for split in stores.SPLITS)
    assert train + held_out == "".join(LINES) and train.endswith("\n")
    assert 0.1 < len(held_out) / len(train + held_out) < 0.3
    assert list(text(source=str(one), held_out=0).build().held_out()) == []


def write_rows(path: Path, texts: list[str], field: str = "body") -> None:
    rows = [{"id": n, field: text} for n, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number, row in enumerate(rows):
            writer.write((json.dumps(row) if number % 2 else texts[number]).encode())  # both forms are read
        writer.close()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.arrayrecord"])
def test_rows(tmp_path, text, name):
    texts = [f"{'{' * (n % 3)}row {n}: " + LINES[n] for n in range(25)]
    write_rows(tmp_path / name, [*texts, ""])
    dataset = text(source=str(tmp_path / name), text_field="body").build()
    documents = [split_documents(dataset, split) for split in stores.SPLITS]
    assert min(map(len, documents)) > 0
    assert sorted(dataset.decode(np.asarray(d)) for d in sum(documents, [])) == sorted(texts)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_tokenizer_json(text, source, tokenizer_file, monkeypatch, caplog):
    from training.tokenizer import FileTokenizer

    monkeypatch.setattr(FileTokenizer, "PIECE", 64)  # long texts go in pieces
    dataset = text(tokenizer=str(tokenizer_file)).build()
    assert (dataset.words, dataset.doc_start) == (301, 300)  # it has no start of its own: one more entry
    documents = [document for split in stores.SPLITS for document in split_documents(dataset, split)]
    texts = [path.read_text(encoding="utf-8") for path in source.iterdir()]
    assert sorted(dataset.decode(np.asarray(document)) for document in documents) == sorted(texts)
    sizes = sorted(int(dataset.token_bytes[document].sum()) for document in documents)
    assert sizes == sorted(len(text.encode()) for text in texts)
    assert sum(map(len, documents)) < 0.7 * sum(sizes), "no token stands for more than a byte"
    assert dataset.digest != text().build().digest
    assert not caplog.records
    # A store is whole without the file it was made with, and can be moved.
    moved = text(source=str(dataset.store.folder)).build()
    assert moved.digest == dataset.digest and same(moved.train(0)[0], dataset.train(0)[0])


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizers_own_start_is_used(text, tokenizer_file, tmp_path, special):
    spec = json.loads(tokenizer_file.read_text())
    spec["added_tokens"] = [
        {"id": 300, "content": "<|endoftext|>", "special": special}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(spec))
    dataset = text(tokenizer=str(path)).build()
    assert (dataset.words, dataset.doc_start, int(dataset.token_bytes[300])) == (301, 300, 0)
    assert dataset.decode(np.append(300, dataset.encode("a line"))) == "a line"


def test_long_texts_are_encoded_in_pieces_that_end_with_a_line():
    from training.tokenizer import _pieces

    text = "".join(LINES)
    pieces = _pieces(text, 100)
    assert "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces)
    assert len(pieces) > 5 and max(map(len, pieces)) < 200
    assert _pieces("x" * 1000, 100) == ["x" * 1000] and _pieces("", 100) == []


def test_a_second_prepare_writes_nothing(text, monkeypatch):
    first = text().build().store
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.folder.iterdir()}
    monkeypatch.setattr(stores, "_write", lambda *_: pytest.fail("wrote a store that was there"))
    again = text(T=8, B=2, shuffle=False).build().store  # what a batch looks like is not the store's business
    assert again.folder == first.folder
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.folder.iterdir()} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["train.tokens", "held_out.offsets.npy", "manifest.json"])
def test_a_damaged_store_is_prepared_again(text, tmp_path, caplog, damage, name):
    config = text(store=str(tmp_path))
    dataset = config.build()
    expected, digest = dataset.train(0)[3], dataset.digest
    damage(dataset.store.folder / name)
    with pytest.raises(DataError, match="damaged"):
        stores.open_store(dataset.store.folder)
    rebuilt = config.build()
    assert same(rebuilt.train(0)[3], expected) and rebuilt.digest == digest
    (record,) = caplog.records
    assert "damaged" in record.getMessage() and "\n" not in record.getMessage()
    assert [path.name for path in tmp_path.iterdir()] == [rebuilt.store.folder.name], "leftovers"
    caplog.clear()
    config.build()
    assert not caplog.records


def test_damage_to_a_store_too_large_to_read_whole(text, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "VERIFIED_BYTES", 0)
    folder = text(store=str(tmp_path)).build().store.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "<u4"}))
    with pytest.raises(DataError, match="manifest.json was changed"):
        stores.open_store(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    stores.open_store(folder)
    truncate(folder / "train.text")
    with pytest.raises(DataError, match=r"train.text has [\d,]+ bytes instead of"):
        stores.open_store(folder)


def test_preparing_at_once_and_failing_midway(text, tmp_path, monkeypatch):
    config = text(store=str(tmp_path))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stores.np.lib.format, "write_array", fail)
        with pytest.raises(DataError, match="No space left on device"):
            config.build()
    assert list(tmp_path.iterdir()) == []

    barrier, digests = threading.Barrier(4), []

    def build():
        barrier.wait()
        digests.append(config.build().digest)

    for _ in range(2):  # the second time around, all of them mend the same store
        threads = [threading.Thread(target=build) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (folder,) = tmp_path.iterdir()
        flip(folder / "train.tokens")
    assert len(digests) == 8 and len(set(digests)) == 1


def _file(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


ERRORS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "T below 1": (lambda tmp: {"T": 0}, "Text.T is 0"),
    "B below 1": (lambda tmp: {"B": -1}, "Text.B is -1"),
    "fraction": (lambda tmp: {"held_out": 1.0}, "Text.held_out is 1.0"),
    "no source": (lambda tmp: {"source": ""}, "Text.source is empty"),
    "missing path": (lambda tmp: {"source": "no/such/place"}, "Text.source is 'no/such/place': no such file or folder"),
    "empty folder": (lambda tmp: {"source": str(tmp)}, "an empty corpus"),
    "empty glob": (lambda tmp: {"source": str(tmp / "*.txt")}, "an empty corpus"),
    "empty file": (lambda tmp: {"source": _file(tmp, "a.txt", b"")}, "an empty corpus"),
    "empty rows": (lambda tmp: {"source": _file(tmp, "a.jsonl", b'{"text": ""}\n')}, "an empty corpus"),
    "unknown extension": (lambda tmp: {"source": _file(tmp, "a.xyz", b"\x00\xff")}, "a.xyz is not text"),
    "missing field": (
        lambda tmp: {"source": _file(tmp, "a.jsonl", b'{"body": "x", "id": 3}\n')},
        "Text.text_field is 'text', but a.jsonl, line 1 has the fields ['body', 'id']",
    ),
    "field of numbers": (lambda tmp: {"source": _file(tmp, "a.jsonl", b'{"text": 3}\n')}, "of type int in a.jsonl"),
    "not an object": (lambda tmp: {"source": _file(tmp, "a.jsonl", b"[3]\n")}, "a.jsonl, line 1 is not a JSON object"),
    "not JSON": (lambda tmp: {"source": _file(tmp, "a.jsonl", b'{"text": "x"}\n{')}, "a.jsonl, line 2 is not JSON"),
    "not Parquet": (lambda tmp: {"source": _file(tmp, "a.parquet", b"PAR0" * 9)}, "a.parquet is not a Parquet file"),
    "not ArrayRecord": (lambda tmp: {"source": _file(tmp, "a.arrayrecord", b"x" * 99)}, "is not an ArrayRecord file"),
    "missing tokenizer": (lambda tmp: {"tokenizer": str(tmp / "t.json")}, "t.json': cannot be read"),
    "unreadable tokenizer": (lambda tmp: {"tokenizer": _file(tmp, "t.json", b"{}")}, "t.json': not a tokenizer"),
    "T too long": (lambda tmp: {"T": 10**6}, "Text.T is 1000000: longer than the corpus"),
    "store in a file": (lambda tmp: {"store": _file(tmp, "a", b"x")}, "Text.store: cannot write"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(text, tmp_path, case):
    fields, message = ERRORS[case]
    with pytest.raises(DataError) as caught:
        text(**fields(tmp_path)).build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_missing_parquet_field_is_named(text, tmp_path):
    write_rows(tmp_path / "a.parquet", ["x"])
    with pytest.raises(DataError, match=r"Text.text_field is 'text', but a.parquet has the fields \['id', 'body'\]"):
        text(source=str(tmp_path / "a.parquet")).build()


def test_references(monkeypatch):
    folder = Path(sysconfig.get_path("stdlib"))
    train, held_out = ((folder / name).read_bytes() for name in ("argparse.py", "optparse.py"))
    values = references(train, held_out)
    assert list(values) == ["order-0", "bigram", "zlib", "xz", "xz after the training text"]
    # By hand, where that is possible.
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1
    bits = -np.log2(counts / counts.sum())[np.frombuffer(held_out, np.uint8)]
    np.testing.assert_allclose(values["order-0"], bits.mean(), rtol=1e-12)
    small = references(b"abab", b"ba")
    np.testing.assert_allclose(small["bigram"], (-np.log2(3 / 260) - np.log2(2 / 257)) / 2, rtol=1e-12)
    monkeypatch.setattr("training.references.BLOCK", 1000)  # however the text is cut for counting
    assert references(train, held_out) == values
    ordered = [values[name] for name in values]
    assert ordered == sorted(ordered, reverse=True) and 8 > ordered[0]
    assert references(b"", b"x") == references(b"x", b"") == {}


def test_references_are_kept_in_the_store(text, monkeypatch):
    dataset = text().build()
    values = dataset.references()
    assert values["order-0"] > 0
    monkeypatch.setattr(stores, "references", lambda *_: pytest.fail("computed again"))
    assert text().build().references() == values


def test_standard_library(tmp_path):
    from training.corpus import open_corpus

    corpus = open_corpus("stdlib")
    names = [name for name, _ in corpus.files]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "idlelib", "site-packages"))
    sizes = {name: path.stat().st_size for name, path in corpus.files}
    held_out = sum(size for name, size in sizes.items() if stores._place(name) < 0.05)
    assert sum(sizes.values()) == corpus.bytes and corpus.bytes > 5e6
    assert 0.03 < held_out / corpus.bytes < 0.07
    wheels = open_corpus("wheels")
    assert {name.split("/")[0] for name, _ in wheels.files} >= {"jax", "numpy", "optax"}


def test_importing_data_is_light_and_the_command_reports(source, tmp_path):
    """Errors in a configuration come before jax is imported; the command prints the manifest."""
    script = "import sys, training.data, training.store; assert not {'jax', 'grain'} & set(sys.modules)"
    command = [sys.executable, "-m", "training.data", "prepare"]
    runs = [
        subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        for arguments in (
            [sys.executable, "-c", script],
            [*command, str(source), "--store", str(tmp_path)],
            [*command, "no/such/place"],
        )
    ]
    assert [run.returncode for run in runs] == [0, 0, 1], runs
    (store,) = tmp_path.iterdir()
    assert json.loads((store / "manifest.json").read_text())["digest"] in runs[1].stdout
    assert runs[2].stderr.startswith("error: Text.source is 'no/such/place'") and runs[2].stderr.count("\n") == 1


def test_base_config_checks_its_sizes():
    with pytest.raises(DataError, match="DataConfig.T is 0"):
        DataConfig(T=0, B=1)

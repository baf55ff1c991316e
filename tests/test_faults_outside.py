"""The fault matrix, what comes from outside: data, loggers, strangers' files, earlier versions. See test_faults.py."""

import errno
import json
import os
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from faults import (
    SUMS,
    bits,
    copied,
    delete,
    files,
    flip,
    losses,
    made_with,
    newest,
    signed_anew,
    trials,
    truncate,
    whole_and_half,
)
from tiny import quiet, trained

import train
from training import run as runs
from training import settings
from training.checkpoint import ARRAYS, META, CheckpointError
from training.data import TextDataset
from training.faults import difference, last_arrays
from training.settings import ConfigError

pytestmark = [
    pytest.mark.xdist_group("faults outside"),
    # of arrays that cannot be read: orbax goes on reading the others when one has failed
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_and_half(tmp_path_factory.mktemp("outside"))


@pytest.fixture
def half(folder, tmp_path):
    return copied(folder / "half", folder / tmp_path.name)


# 12: data.


def slow(folder, monkeypatch, trial):
    batch = TextDataset.batch
    monkeypatch.setattr(TextDataset, "batch", lambda *a: (time.sleep(0.02), batch(*a))[1])


def an_empty_document(folder, monkeypatch, trial):
    (folder / "text" / "empty.txt").write_text("")


def text_that_is_none(folder, monkeypatch, trial):
    path = sorted((folder / "text").iterdir())[trial % 20]
    path.write_bytes(bytes(np.random.default_rng(trial).integers(128, 256, 64, np.uint8)) + path.read_bytes())


def a_short_file(folder, monkeypatch, trial):
    path = sorted((folder / "text").iterdir())[trial % 20]
    os.truncate(path, path.stat().st_size // 2)


def a_replaced_file(folder, monkeypatch, trial):
    sorted((folder / "text").iterdir())[trial % 20].write_text("other words\n" * 30)


def a_file_that_is_gone(folder, monkeypatch, trial):
    sorted((folder / "text").iterdir())[trial % 20].unlink()


def a_damaged_store(folder, monkeypatch, trial):
    draw = np.random.default_rng(trial)
    among = files(folder / "store")
    (flip, truncate, delete)[trial % 3](among[int(draw.integers(len(among)))], draw)


def a_reader_that_raises(folder, monkeypatch, trial):
    batch = TextDataset.batch

    def fails(self, seed, step, rows=None):
        if step >= 9:
            raise OSError(errno.EIO, "Input/output error")
        return batch(self, seed, step, rows)

    monkeypatch.setattr(TextDataset, "batch", fails)


SAME = (slow, an_empty_document, a_damaged_store)
CHANGED = (text_that_is_none, a_short_file, a_replaced_file, a_file_that_is_gone)


@trials(8, 60)
def test_12_data(folder, tmp_path, trial, monkeypatch, capsys):
    """Between a run and its going on: repaired, or told from the data that the run was trained on."""
    for name in ("text", "store", "half"):
        copied(folder / name, tmp_path / name)
    fault = (*SAME, *CHANGED, a_reader_that_raises)[trial % 8]
    fault(tmp_path, monkeypatch, trial // 8)
    run = tmp_path / "half"
    config = tiny.config_file(tmp_path)
    made_with(run, config.read_text())  # or the other folder's name would tell: what is compared is the data
    monkeypatch.setattr("training.report.report", lambda *_, **__: None)
    monkeypatch.setattr("probes.after.look", lambda *_, **__: None)
    if fault in SAME:
        assert train.main([str(config), "--run", str(run)]) == 0
        assert difference(folder / "whole", run) is None
        return
    assert train.main([str(config), "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert ("the data has changed since step 8" if fault in CHANGED else "Input/output error") in said, said
    assert newest(run).name == "00000008"
    monkeypatch.undo()
    for name in ("text", "store"):
        shutil.rmtree(tmp_path / name)
        copied(folder / name, tmp_path / name)
    trained(tmp_path, "half")
    assert difference(folder / "whole", run) is None


@trials(1, 3)
def test_12_more_words_than_the_model_knows(folder, trial):
    with pytest.raises(ConfigError, match=r"model\.W is \d+") as caught:
        trained(folder, "words", model__W=(256, 100, 8)[trial])
    assert "\n" not in str(caught.value)


# 14: loggers.


def raises(*_, **__):
    raise ConnectionError("unreachable")


@trials(3, 20)
def test_14_loggers(folder, tmp_path, trial, monkeypatch, caplog):
    run = folder / f"logged {tmp_path.name}"
    draw, where = np.random.default_rng(trial), ("start", "a line", "the end", "the disk")[trial % 4]
    first = int(draw.integers(1, 18))
    wandb = types.ModuleType("wandb")
    page = types.SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda _: None, finish=lambda: None)
    wandb.init = raises if where == "start" else lambda **_: page
    if where == "a line":
        page.log = lambda values: raises() if values["step"] >= first else None
    elif where == "the end":
        page.finish = raises
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write = os.write

    def full(descriptor, content):
        if content.startswith(b'{"step": ') and json.loads(content)["step"] == first:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    if where == "the disk":
        monkeypatch.setattr(os, "write", full)
    assert trained(folder, run.name, train__wandb="project")["status"] == "done"
    assert bits({"": last_arrays(run)[1]}) == bits({"": last_arrays(folder / "whole")[1]})
    assert len([r for r in caplog.records if "unreachable" in r.getMessage() or "No space" in r.getMessage()]) == 1
    assert tiny.steps(run) == [n for n in range(1, 21) if n != first or where != "the disk"]


# 15: what strangers send.


def pickled(mark: Path) -> bytes:
    """A pickle, written out, that makes a folder when it is loaded."""
    return f"cposix\nmkdir\n(S'{mark}'\ntR.".encode()


def a_pickle_beside(step: Path, mark: Path) -> None:
    (step / ARRAYS / "state.pkl").write_bytes(pickled(mark))


def a_pickle_for_a_file(step: Path, mark: Path) -> None:
    path = max((p for p in files(step) if p.name != SUMS), key=lambda p: p.stat().st_size)
    path.write_bytes(pickled(mark))


def a_pickle_for_the_record(step: Path, mark: Path) -> None:
    (step / META).write_bytes(pickled(mark))


def code_in_the_record(step: Path, mark: Path) -> None:
    record = json.loads((step / META).read_text())
    record["meta"]["config"] = f"import os\nos.mkdir({str(mark)!r})\n"
    record["meta"]["step"] = f"__import__('os').mkdir({str(mark)!r})"
    (step / META).write_text(json.dumps(record))


def a_header_without_end(step: Path, mark: Path) -> None:
    record = json.loads((step / META).read_text())
    name = next(iter(record["arrays"]["params"]))
    record["arrays"]["params"][name][1] = [2**40, 2**20]
    (step / META).write_text(json.dumps(record))


def a_link(step: Path, mark: Path) -> None:
    (step / ARRAYS / "link").symlink_to("/etc/hostname")


def a_way_out(step: Path, mark: Path) -> None:
    with (step / SUMS).open("a") as file:
        file.write("0" * 64 + "  ../../../../etc/hostname\n")


HOSTILE = (
    a_pickle_beside, a_pickle_for_a_file, a_pickle_for_the_record, code_in_the_record, a_header_without_end, a_link,
    a_way_out,
)  # fmt: skip


@trials(7, 42)
def test_15_a_strangers_checkpoint(folder, half, tmp_path, trial):
    """With digests that fit, or not: it is refused or read as numbers, and nothing in it runs."""
    fault, mark, again = HOSTILE[trial % 7], tmp_path / "mark", trial // 7
    fault(newest(half), mark)
    if again % 2 and fault not in (a_link, a_way_out):
        signed_anew(newest(half))
    try:
        trained(folder, half.name) if again < 3 else runs.load_model(half)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not mark.exists()


@trials(3, 18)
def test_15_a_strangers_words(folder, tmp_path, trial, monkeypatch, capsys):
    """Code where a value is asked for, or a tokenizer: one line, and nothing of it runs."""
    mark = tmp_path / "mark"
    code = f"__import__('os').mkdir({str(mark)!r})"
    tokenizer = tmp_path / "tokenizer.json"
    texts = ('{"model": ' + json.dumps(code) + "}", "!!python/object/apply:os.mkdir [" + str(mark) + "]", "[" * 50_000)
    tokenizer.write_text(texts[trial // 6 % 3])
    fields = ("model.D", "optimizer.lr", "data.source", "mesh.data", "model.stages.0.pattern.0.H")
    flag = f"--{fields[trial % 5]}={code}" if trial % 6 != 5 else f"--data.tokenizer={tokenizer}"
    monkeypatch.chdir(tmp_path)
    assert train.main([str(tiny.config_file(folder)), flag, "--run", "run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert not mark.exists() and not Path("run").exists()


# 16: what earlier versions left.

OLD = sorted((Path(__file__).parent / "golden" / "old_runs").glob("*.tar.xz"))
assert OLD, "there is no older run to go on with"  # or pytest would skip the test


@pytest.mark.parametrize("archive", OLD, ids=lambda path: path.name.partition(".")[0])
def test_16_an_older_run(tmp_path, archive, monkeypatch):
    """Stopped at step 8 by the version that wrote it; goes on, to the losses that this version has without a stop."""
    shutil.unpack_archive(archive, tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    run = next(path.parent for path in tmp_path.rglob("config.py"))
    experiment = settings.load(run / "config.py")
    console = quiet()
    outcome = runs.train(experiment, run, console=console)
    assert outcome["status"] == "done" and "from step 8" in console.file.getvalue()
    runs.train(experiment, tmp_path / "anew", console=quiet())
    want = losses(tmp_path / "anew")
    assert losses(run).keys() == want.keys()
    np.testing.assert_allclose([*losses(run).values()], [*want.values()], rtol=1e-5)

"""Checkpoints: exact, atomic, and never silently wrong. Every fault here is injected into real files."""

import asyncio
import gc
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import signed_anew
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training.checkpoint import ARRAYS, META, SUMS, CheckpointError, Checkpoints
from training.hush import hush

ROOT = Path(__file__).parents[1]


def tree(step: int) -> dict:
    """Arrays whose every value tells the step."""
    return {
        "params": {
            "stages.0.layers.1.q.w": jnp.asarray(np.random.default_rng(step).normal(size=(8, 16)), jnp.float32),
            "embed/table": jnp.asarray(np.random.default_rng(step).normal(size=(16, 4)), jnp.bfloat16),
        },
        "opt": {"count": jnp.int32(step), "key": jnp.full((2,), step + 2**31, jnp.uint32), "none": jnp.zeros((0, 3))},
        "ema": {},
    }


def meta(step: int) -> dict:
    return {"step": step, "data": {"seed": 1, "position": 10 * step}, "config": f"Config(D={step})"}


def same(a: dict, b: dict) -> bool:
    """Equal to the bit, names, shapes and dtypes included."""
    flat_a, def_a = jax.tree.flatten(a)
    flat_b, def_b = jax.tree.flatten(b)
    return def_a == def_b and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(flat_a, flat_b, strict=True)
    )


def filled(folder: Path, steps=(1, 2, 3), **kwargs) -> Checkpoints:
    checkpoints = Checkpoints(folder, **{"keep_last": 3, **kwargs})
    for step in steps:
        checkpoints.save(step, tree(step), meta(step))
    checkpoints.close()
    return checkpoints


def expect(folder: Path, step: int) -> None:
    found, arrays, read = Checkpoints(folder).restore(tree(0))
    assert found == step and same(arrays, tree(step)) and read == meta(step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    filled(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of three good checkpoints, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# Saving and keeping.


def test_restores_what_was_saved(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.peek() == meta(3) and checkpoints.peek(2) == meta(2)
    expect(folder, 3)
    step, arrays, read = checkpoints.restore(tree(0), step=2)
    assert step == 2 and same(arrays, tree(2)) and read == meta(2)
    only = {"params": tree(0)["params"]}
    assert same(checkpoints.restore(only)[1], {"params": tree(3)["params"]})


def test_the_digests_are_those_of_sha256sum(folder):
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", SUMS], cwd=folder / "00000003", check=True)


def test_empty_folder_is_none_and_absent_step_an_error(tmp_path, folder):
    assert Checkpoints(tmp_path / "empty").restore(tree(0)) is None
    assert Checkpoints(tmp_path / "absent", writable=False).peek() is None
    assert not (tmp_path / "absent").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*there are: 1, 2, 3"):
        Checkpoints(folder).restore(tree(0), step=7)


def test_donated_buffers_are_safe(tmp_path):
    arrays = {"params": {f"w{i}": jnp.full((512, 256), i, jnp.float32) for i in range(4)}}
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), arrays)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1.0, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {})
        for _ in range(3):
            arrays = update(arrays)
        jax.block_until_ready(arrays)
        checkpoints.wait()
        assert same(checkpoints.restore(arrays)[1], wanted)


def test_keeps_the_last_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in enumerate([3.0, 1.0, float("nan"), 2.0, 5.0, None], start=1):
            checkpoints.save(step, tree(step), meta(step), metric)
    assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:  # the metrics are remembered on disk
        checkpoints.save(7, tree(7), meta(7), 1.5)
    assert checkpoints.steps() == [2, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000007"]


def test_an_abandoned_future_is_deleted_once_the_new_one_is_complete(folder):
    with Checkpoints(folder, keep_last=2) as checkpoints:
        assert checkpoints.restore(tree(0), step=1)[0] == 1
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(2, tree(20), meta(20))
    assert checkpoints.steps() == [1, 2]
    found, arrays, read = checkpoints.restore(tree(0))
    assert found == 2 and same(arrays, tree(20)) and read == meta(20)


def test_restores_onto_another_mesh(tmp_path):
    def mesh(*shape):
        return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))

    x = jnp.arange(64 * 16, dtype=jnp.float32).reshape(64, 16)
    placed = jax.device_put(x, NamedSharding(mesh(4, 2), PartitionSpec("data", "model")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"x": placed}}, {})
        checkpoints.wait()
        for shape, spec in (((8, 1), ("data", None)), ((2, 4), ("model", "data")), ((1, 8), (None, "model"))):
            sharding = NamedSharding(mesh(*shape), PartitionSpec(*spec))
            like = {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}}
            got = checkpoints.restore(like)[1]["params"]["x"]
            assert got.sharding.is_equivalent_to(sharding, x.ndim) and same({"x": got}, {"x": x})


# Damage.


def files(folder: Path, step: int = 3) -> list[Path]:
    return sorted(path for path in (folder / f"{step:08d}").rglob("*") if path.is_file())


def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path, position: float) -> None:
    os.truncate(path, int(position * (path.stat().st_size - 1)))


def delete(path: Path, position: float) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_any_damaged_file_falls_back_and_is_named(folder, caplog, damage):
    whole = folder.with_name("whole")
    shutil.copytree(folder / "00000003", whole)
    place = random.Random(0)
    for path in files(folder):
        for position in (0.0, 1.0, place.random()):
            caplog.clear()
            damage(path, position)
            expect(folder, 2)
            (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            name = path.relative_to(folder / "00000003").as_posix()
            assert "step 3" in warning and (name in warning or path.name == SUMS) and "\n" not in warning
            shutil.rmtree(folder / "00000003")
            shutil.copytree(whole, folder / "00000003")
    expect(folder, 3)


def test_empty_step_folder_and_extra_files_fall_back(folder, caplog):
    shutil.rmtree(folder / "00000003")
    (folder / "00000003").mkdir()
    assert Checkpoints(folder).steps() == [1, 2]
    (folder / "00000002" / ARRAYS / "extra").write_text("?")
    expect(folder, 1)
    assert "SHA256SUMS is missing" in caplog.text and "arrays/extra is not listed" in caplog.text


def test_links_are_not_followed(folder, caplog):
    secret = folder.parent / "secret"
    secret.write_text("?")
    (folder / "00000003" / ARRAYS / "link").symlink_to(secret)
    with (folder / "00000002" / SUMS).open("a") as file:
        file.write("0" * 64 + "  ../../secret\n")
    expect(folder, 1)
    assert "arrays/link is a link" in caplog.text and "../../secret is missing" in caplog.text


def test_leftover_of_a_killed_save_is_removed_by_writers_only(folder):
    leftover = folder / "tmp-00000004-1" / "arrays.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    assert Checkpoints(folder, writable=False).restore(tree(0))[0] == 3 and leftover.exists()
    expect(folder, 3)
    assert not leftover.parent.exists()


@pytest.mark.parametrize(
    "broken",
    [
        {"arrays": None}, {"meta": None}, {"format": None}, {"arrays": [1]}, {"arrays": {"params": 3}},
        {"meta": "text"}, {"arrays": {"params": {"w": ["float99", [1]]}}}, {"arrays": {"params": {"w": "?"}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_lacks_something_falls_back(folder, caplog, broken):
    """Valid JSON, and digests that fit."""
    changed(folder / "00000003", broken)
    expect(folder, 2)
    assert Checkpoints(folder).peek() == meta(2) and Checkpoints(folder).shapes()["opt"].keys() == tree(0)["opt"].keys()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3 and all("step 3" in text and META in text and "\n" not in text for text in warnings)
    changed(folder / "00000002", {"metric": None})
    with Checkpoints(folder, keep_last=1, keep_best=1) as checkpoints:
        checkpoints.save(4, tree(4), meta(4))
    assert checkpoints.steps() == [4]


def changed(step: Path, fields: dict) -> None:
    """A record with other fields, without those that are None, and signed anew."""
    record = {**json.loads((step / META).read_text()), **fields}
    (step / META).write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    signed_anew(step)


def test_all_bad_is_one_line_and_changes_nothing(folder):
    for step in (1, 2, 3):
        flip(files(folder, step)[-1], 0.5)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps 1, 2, 3\)") as caught:
        Checkpoints(folder).restore(tree(0))
    assert "\n" not in str(caught.value) and Checkpoints(folder).steps() == [1, 2, 3]


def test_a_damaged_step_asked_for_by_name_is_an_error(folder):
    flip(folder / "00000002" / META, 0.5)
    with pytest.raises(CheckpointError, match=r"step 2 .* meta.json differs from its digest"):
        Checkpoints(folder).restore(tree(0), step=2)
    assert Checkpoints(folder).peek() == meta(3)


def test_a_damaged_newest_does_not_push_good_ones_out(folder):
    flip(folder / "00000003" / META, 0.5)
    with Checkpoints(folder, keep_last=2, keep_best=0) as checkpoints:
        assert checkpoints.restore(tree(0))[0] == 2
        checkpoints.save(3, tree(3), meta(3))
    assert checkpoints.steps() == [2, 3]
    expect(folder, 3)


def test_another_model_is_refused_not_passed_over(folder, caplog):
    def message(like: dict) -> str:
        with pytest.raises(CheckpointError) as caught:
            Checkpoints(folder).restore(like)
        assert str(caught.value).count("\n") < 2
        return str(caught.value)

    other = tree(0)
    other["params"] = {name: jnp.zeros((2, *x.shape[1:]), x.dtype) for name, x in other["params"].items()}
    text = message(other)
    assert "step 3" in text and "'stages.0.layers.1.q.w' is float32[8,16] there and float32[2,16] here" in text
    assert "1 more" in text
    other = tree(0)
    other["params"]["new"] = jnp.zeros(3)
    del other["opt"]["count"]
    text = message(other)
    assert "'new' is absent there and float32[3] here" in text and "1 more" in text
    other = tree(0)
    other["opt"]["count"] = jnp.float32(0)
    assert "opt 'count' is int32[] there and float32[] here" in message(other)
    assert "it has no 'teacher'" in message({**tree(0), "teacher": {}})
    assert not caplog.records


# Disks that refuse.


def refused(checkpoints: Checkpoints, step: int, arrays: dict | None = None, late: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(step, arrays or tree(step), meta(step))
        checkpoints.wait()
    text = str(caught.value)
    assert f"step {step} was not saved" in text and "1, 2, 3" in text and "\n" not in text
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert [n for n in names if not (late and n.startswith("tmp-"))] == ["00000001", "00000002", "00000003"]
    return text


# tensorstore reports the second failed write of a save to an event loop that the first has ended
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_write_cut_short_leaves_the_old_ones_and_can_be_repeated(folder, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = {"params": {f"p{n}": jnp.full((80, 100), n, jnp.float32) for n in range(60)}}
    with Checkpoints(folder, keep_last=3) as checkpoints:
        try:  # the kernel itself refuses to let a file grow: the same path through the writers as a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
            assert "File too large" in refused(checkpoints, 4, late=True)
            assert "File too large" in refused(checkpoints, 4, many, late=True)  # writes may outlive their save
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        gc.collect()  # asyncio tells of a failed write that nobody asked for when it is collected
        assert not caplog.records  # one error, no pages of traceback
        expect(folder, 3)
        checkpoints.save(4, tree(4), meta(4))
    assert sorted(path.name for path in folder.iterdir()) == ["00000002", "00000003", "00000004"]
    expect(folder, 4)


@pytest.mark.parametrize("of, logged", [("orbax", 0), ("theirs", 1)])
def test_only_failed_writes_of_orbax_go_untold(folder, caplog, of, logged):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(4, tree(4), meta(4))

    async def write() -> None:
        raise OSError(27, "File too large")

    write.__code__ = write.__code__.replace(co_filename=f"/packages/{of}/checkpoint/store.py")

    async def lost() -> None:
        asyncio.ensure_future(write())  # noqa: RUF006 - nobody asks how it went, as where a save failed before it
        await asyncio.sleep(0.01)

    asyncio.run(lost())
    gc.collect()
    assert sum("never retrieved" in record.getMessage() for record in caplog.records) == logged


@pytest.mark.parametrize("name, told", [("async_serialize_from_host.<locals>.write_fragment", 0), ("training_step", 1)])
def test_only_writes_of_orbax_that_never_began_go_untold(name, told):
    async def begun() -> None: ...

    begun.__qualname__ = name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush()
        begun()
        gc.collect()
    assert len(caught) == told


def test_a_disk_too_small_is_known_before_writing(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with Checkpoints(folder) as checkpoints:
        assert "do not fit" in refused(checkpoints, 4)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_the_disk_fills_while_committing(folder, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            assert "No space left on device" in refused(checkpoints, 4)


def test_unwritable_folder(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="for reading only"):
        Checkpoints(folder, writable=False).save(4, tree(4), {})


@pytest.mark.parametrize("asked", [0, 1])
def test_a_folder_that_was_lost_is_not_written(folder, asked):
    """Before a save, or when all is written but the name."""
    answers = iter([""] * asked + ["it is theirs now"] * 3)
    with Checkpoints(folder, keep_last=3, lost=lambda: next(answers)) as checkpoints:
        assert "step 4 was not saved in" in (said := refused(checkpoints, 4, late=True)) and "it is theirs now" in said
    assert len(list(folder.glob("tmp-*"))) == asked  # nor is anything deleted


# Kill -9.

_SAVER = """
import sys
from training.checkpoint import Checkpoints
sys.path.insert(0, "tests")
from test_checkpoint import meta, tree
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in range(1, 10_000):
        checkpoints.save(step, tree(step), meta(step))
        print(step, flush=True)
"""


@pytest.mark.parametrize("trial", range(3))
def test_kill_in_the_middle_of_saving(tmp_path, trial):
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process, process.stdout as lines:
        for _ in range(3):
            lines.readline()
        time.sleep(random.Random(trial).uniform(0.0, 0.1))
        process.kill()
        last = [3, *(int(line) for line in lines.read().split("\n")[:-1])][-1]
    found, arrays, read = Checkpoints(tmp_path).restore(tree(0))
    assert last - 1 <= found <= last + 1  # `save` of a step returns when the step before it is complete
    assert same(arrays, tree(found)) and read == meta(found)
    assert all(path.name.isdigit() for path in tmp_path.iterdir())

"""Several processes: the same numbers as one, one checkpoint, one end; over loopback, with real processes."""

import os
import re
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import crowd
import jax
import numpy as np
import pytest
import tiny
from crowd import Crowd

from training import processes
from training.experiment import Mesh
from training.flags import Processes
from training.layout import build_layout
from training.lock import RunLock
from training.log import read
from training.run import load_model
from training.settings import ConfigError

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(600)]
LONG = {"train__steps": 20, "train__checkpoint_every": 8, "train__eval_every": 10}
SHORT = 5  # steps of an undisturbed run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `one`, of one device, and `eight`: runs of one process."""
    folder = tmp_path_factory.mktemp("processes")
    for name, mesh in {"one": Mesh(data=1), "eight": Mesh()}.items():
        alone(folder, name, mesh=mesh)
    return folder


@pytest.fixture(scope="module")
def long(folder):
    """A longer run of one process, to be compared with several that were disturbed."""
    alone(folder, "long", **LONG)
    return folder / "long"


def alone(folder, name, **changes):
    """Trains in this process."""
    return tiny.train(crowd.experiment(folder, **changes), folder / name, console=tiny.quiet())


def losses(run):
    """Of every step, and of every evaluation."""
    lines = read(run)
    steps = [line["step"] for line in lines if "kind" not in line]
    assert steps == [*range(1, len(steps) + 1)]
    return np.array([line["loss"] for line in lines])


def hashed(run):
    from models.parameters import flatten

    return crowd.digest(flatten(load_model(run)[0])[0])


# Gloo says for each device that it is connected, in these pieces. The devices' threads write at once, so that one's
# piece may stand in the middle of another's line.
GLOO = "[Gloo] Rank ", " is connected to ", " peer ranks. Expected number of connected peer ranks is : "


def silent(ended):
    """Nothing but what gloo prints of itself: three numbers of one digit and an end of line with each of its pieces."""
    rest = ended.out
    for piece in GLOO:
        rest = rest.replace(piece, "")
    lines = ended.out.count(GLOO[0])
    assert [ended.out.count(piece) for piece in GLOO] == [lines] * 3
    assert re.fullmatch(r"[\d\n]*", rest) and rest.count("\n") == lines and len(rest) == 4 * lines
    assert ended.err == ""


def compared(folder, count, devices, layout):
    run = folder / f"{layout}{count}"
    config = crowd.config_file(folder, mesh=Mesh(fsdp=8 if layout == "fsdp" else 1))
    first, *others = Crowd(count, devices, config, "--run", run).ended()
    assert first.status == 0, first.err
    for other in others:
        assert other.status == 0, other.err
        silent(other)
    assert f", {count} processes" in first.out and first.err == ""
    for name in ("one", "eight"):
        np.testing.assert_allclose(losses(run), losses(folder / name), rtol=1e-5)
    newest = run / "checkpoints" / f"{SHORT:08d}"
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=newest, check=True)
    names = {line.split("  ")[1] for line in (newest / "SHA256SUMS").read_text().splitlines()}
    assert names == {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000003", "00000005"]
    # What the processes held when they had trained is what one device reads from their checkpoint.
    assert re.search(r"^parameters (\w{64})$", first.out, re.M)[1] == hashed(run)


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_two_processes_are_as_one(folder, layout):
    compared(folder, 2, 4, layout)


def started(folder, run, *, count=2, devices=4, until=3, **more):
    """A longer run, as soon as it has logged some steps."""
    crowded = Crowd(count, devices, crowd.config_file(folder, **LONG), "--run", run, **more)
    while all(p.poll() is None for p in crowded.processes) and len(tiny.steps(run)) < until:
        time.sleep(0.01)
    return crowded


def resumed(folder, run, *, count=2, devices=4):
    config = crowd.config_file(folder, **LONG)
    for ended in Crowd(count, devices, config, "--run", run).ended():
        assert ended.status == 0, ended.err


def test_a_signal_to_one_stops_all_at_one_step(folder, long):
    run = folder / "stopped"
    crowded = started(folder, run)
    crowded.processes[1].send_signal(signal.SIGTERM)
    first, second = crowded.ended()
    assert (first.status, second.status) == (128 + signal.SIGTERM,) * 2, first.err + second.err
    step = int(re.search(r"^SIGTERM: saved step (\d+)\. Continue with: ", first.err, re.M)[1])
    assert "process 1: SIGTERM: saving a checkpoint" in second.err and "saved step" not in second.err
    assert len(tiny.steps(run)) == step < LONG["train__steps"]
    assert f"{step:08d}" in {path.name for path in (run / "checkpoints").iterdir()}
    resumed(folder, run)
    np.testing.assert_allclose(losses(run), losses(long), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_four_processes_are_as_one(folder, layout):
    compared(folder, 4, 2, layout)


@pytest.mark.slow
def test_a_model_axis_over_processes(folder):
    """Each row of the batch lies on devices of both: both make it."""
    mesh = Mesh(model=8)
    config = crowd.config_file(folder, mesh=mesh)
    for ended in Crowd(2, 4, config, "--run", folder / "model axis").ended():
        assert ended.status == 0, ended.err
    np.testing.assert_allclose(losses(folder / "model axis"), losses(folder / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "victim", "then"), [(2, 4, 0, 1), (2, 4, 1, 4), (4, 2, 2, 2), (4, 2, 0, 2)]
)
def test_when_one_dies_all_leave_and_others_go_on(folder, long, count, devices, victim, then):
    run, heartbeat = folder / f"{victim} of {count}", 4
    more = {index: [f"--processes.heartbeat={heartbeat}"] for index in range(count)}
    crowded = started(folder, run, count=count, devices=devices, until=10, more=more)
    crowded.processes[victim].kill()
    died = time.monotonic()
    while any(p.poll() is None for p in crowded.processes) and time.monotonic() - died < 60:
        time.sleep(0.01)
    assert time.monotonic() - died < heartbeat + 5
    for index, ended in enumerate(crowded.ended()):
        if victim == 0 != index:  # JAX has its own word then, and may be faster
            assert f"process {index}: process 0 is gone" in ended.err or "another task died" in ended.err, ended.err
            assert ended.status in (processes.LOST, -signal.SIGABRT), ended.err
        elif index != victim:
            assert re.fullmatch(f"process {index}: process {victim} is gone, silent for . s: .*\n", ended.err), (
                ended.err
            )
            assert ended.status == processes.LOST, ended.err
    resumed(folder, run, count=then, devices=8 // then)
    np.testing.assert_allclose(losses(run), losses(long), rtol=1e-6)


@pytest.mark.slow
def test_slurm_is_found(folder):
    number = crowd.port(61440)  # JAX makes the port of the job's number
    variables = {"SLURM_JOB_ID": str(number - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    variables |= {"SLURM_LOCALID": "0", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    run, config = folder / "slurm", crowd.config_file(folder)
    told = Crowd(2, 4, config, "--run", run, variables=lambda index: variables | {"SLURM_PROCID": str(index)}).ended()
    assert [ended.status for ended in told] == [0, 0], told
    assert ", 2 processes" in told[0].out
    np.testing.assert_allclose(losses(run), losses(folder / "one"), rtol=1e-5)


@pytest.mark.slow
def test_one_that_cannot_write_fails_the_save_of_all(folder, long):
    run = folder / "full"
    config = crowd.config_file(folder, **LONG, mesh=Mesh(fsdp=8))
    first, second = Crowd(2, 4, config, "--run", run, largest_file={1: 3000}).ended()
    assert (first.status, second.status) == (2, 2), first.err + second.err
    reason = f"step 8 was not saved in {run}/checkpoints: File too large (earlier checkpoints, untouched: none)"
    assert second.err.splitlines()[-1] == f"process 1: error: {reason}"
    assert first.err == f"process 0: process 1 stopped: {reason}\n"
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    resumed(folder, run)
    np.testing.assert_allclose(losses(run), losses(long), rtol=1e-6)


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all(folder):
    config, run = crowd.config_file(folder), folder / "refused"
    told = Crowd(2, 4, config, "--run", run, more={1: ["--train.seed=1"]}).ended()
    assert [ended.status for ended in told] == [2, 2]
    assert "process 1 was given another config or other flags" in told[0].err
    with RunLock(run):
        told = Crowd(2, 4, config, "--run", run).ended()
    assert [ended.status for ended in told] == [2, 2]
    assert told[0].err.startswith(f"process 0: error: {run} is in use by process {os.getpid()} on ")
    assert told[1].err.startswith(f"process 1: process 0 stopped: {run} is in use by process ")
    assert {ended.err.count("\n") for ended in told} == {1}
    told = Crowd(2, 4, config, "--run", run, "--data.B=4").ended()
    assert [ended.status for ended in told] == [2, 2]
    assert "data.B is 4, which does not divide over mesh.data = 8: choose a multiple" in told[0].err


# Of one process.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 2}, "processes.coordinator is missing"),
        ({"coordinator": "here:1", "index": 0}, "processes.count is missing"),
        ({"coordinator": "here:1", "count": 2}, "processes.index is missing"),
        ({"coordinator": "here", "count": 2, "index": 0}, "processes.coordinator is 'here': give host:port"),
        ({"coordinator": "here:1", "count": 2, "index": 2}, "processes.index is 2: it must be 0 to 1"),
        ({"coordinator": "here:1", "count": 0, "index": 0}, "processes.count is 0"),
        ({"heartbeat": 1}, "processes.heartbeat is 1"),
    ],
)
def test_flags_that_join_nothing(given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Processes(**given)
    assert "\n" not in str(caught.value)


SLURM = {name: "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")}


def test_one_process_waits_for_nobody(monkeypatch):
    """A job of one task, a TPU of one host, a pod that is alone."""
    processes.start(Processes())
    for name, value in (SLURM | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    processes.start(Processes())
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert processes._detected() == 2
    processes.start(Processes(count=1))
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    processes.start(Processes())
    assert not jax.distributed.is_initialized()
    assert processes.first() and processes.count() == 1 and processes.name() == ""
    assert processes.Meeting("alone").exchange("said") == ["said"]
    assert processes.stop_after(3, None) is None and processes.stop_after(3, "SIGTERM") == "SIGTERM"


def test_surroundings_that_do_not_answer(monkeypatch, caplog):
    for name, value in (SLURM | {"SLURM_NTASKS": "many"}).items():
        monkeypatch.setenv(name, value)
    assert processes._detected() == 1
    (record,) = caplog.records
    assert "training alone" in record.getMessage() and "\n" not in record.getMessage()


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"processes.coordinator is '{where}': .*in use.*; give another port"):
            processes.start(Processes(coordinator=where, count=2, index=0))


def test_a_mesh_leaves_no_process_out():
    devices = [SimpleNamespace(process_index=n // 4) for n in range(8)]
    with pytest.raises(
        ValueError, match=r"mesh\.data = 4 leave process 1 without a device: make th"
    ):
        build_layout(Mesh(data=4), 8, 8, devices)

"""The fault matrix, with processes of their own: kills, signals, disks, locks, other numbers of processes. See
test_faults.py."""

import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import crowd
import numpy as np
import pytest
import tiny
from crowd import Crowd
from faults import SIGNALS, copied, losses, newest, trials

from training import processes
from training.experiment import Mesh
from training.faults import MOMENTS, difference, look, strike

pytestmark = pytest.mark.timeout(600)
ONE, SEVERAL = (pytest.mark.xdist_group(f"faults of {many}") for many in ("a process", "several processes"))
LONG = {"train__steps": 300, "train__checkpoint_every": 20, "train__eval_every": 50}
EVALUATIONS = {50, 100, 150, 200, 250, 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `long`, a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.trained(folder, "long", **LONG)
    tiny.config_file(folder, **LONG)
    return folder


def begin(folder: Path, run: Path, until: int = 0) -> subprocess.Popen:
    """The long run in a process, as soon as it has logged some steps."""
    process = tiny.start(folder / "tiny.py", "--run", run)
    while process.poll() is None and look(run, set()).step < until:
        time.sleep(0.001)
    return process


def ends_as_if_nothing_had_happened(folder: Path, run: Path) -> None:
    assert tiny.trained(folder, run.name, **LONG)["status"] == "done"
    assert difference(folder / "long", run) is None
    shutil.rmtree(run)


@ONE
@trials(2, 100)
def test_01_hard_kill(folder, trial):
    """While starting, between steps, while saving, while evaluating; killed before, while it reads its checkpoint."""
    draw, run, aim = random.Random(trial), folder / f"killed {trial}", MOMENTS[trial % 5]
    if aim == "restore":
        process = begin(folder, run, draw.randrange(40, 200))
        process.kill(), process.communicate()
    process = tiny.start(folder / "tiny.py", "--run", run)
    assert strike(process, run, aim, draw.randrange(1, 220), EVALUATIONS, 5.0, draw)
    process.communicate()
    left = look(run, EVALUATIONS)
    assert left.step - (left.checkpoint or 0) <= 2 * LONG["train__checkpoint_every"]  # all that is trained again
    ends_as_if_nothing_had_happened(folder, run)


@SEVERAL
@trials(0, 4)
def test_02_preemption_of_one_of_two(crowds, trial):
    run = crowds / f"preempted {trial}"
    crowded = started(crowds, run, 2, until=3 + trial)
    crowded.processes[trial % 2].send_signal(SIGNALS[trial % 3])
    told = crowded.ended()
    assert [ended.status for ended in told] == [128 + SIGNALS[trial % 3]] * 2, told
    resumed(crowds, run, 2)
    np.testing.assert_allclose([*losses(run).values()], [*losses(crowds / "whole").values()], rtol=1e-6)


@ONE
@trials(0, 6)
def test_03_a_third_signal(folder, trial):
    """It leaves at once, with whatever was whole."""
    draw, run = random.Random(trial), folder / f"thrice {trial}"
    process = begin(folder, run, draw.randrange(20, 200))
    for _ in range(3):
        process.send_signal(SIGNALS[trial % 2])
        time.sleep(draw.uniform(0, 0.02))
    _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + SIGNALS[trial % 2] and "Traceback" not in said, said
    ends_as_if_nothing_had_happened(folder, run)


def enclosed(script: str, *arguments: object) -> subprocess.CompletedProcess | None:
    """A shell that may mount; None where this machine does not let us."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *map(str, arguments)]
    if subprocess.run([*words[:4], "true"], capture_output=True).returncode:
        return None
    return subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, timeout=250)


FULL = """
size=$1 run=$2 out=$3; shift 3
mount -t tmpfs -o size=${size}k tmpfs "$run" || exit 99
"$@"; code=$?
cp -r "$run/." "$out"; exit $code
"""


@ONE
@trials(1, 12)
def test_07_disk_full(folder, trial):
    """A disk in memory, of a few hundred kilobytes; where that is not allowed, files that may not grow."""
    run, out = folder / f"full {trial}", folder / f"left {trial}"
    run.mkdir(), out.mkdir()
    size = 150 + 40 * trial
    done = enclosed(FULL, size, run, out, *tiny.command(folder / "tiny.py", "--run", run))
    if done is None:
        done = tiny.run(folder / "tiny.py", "--run", out, largest_file=1000 * size)
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        assert re.search(r"^error: .*(No space left on device|do not fit|File too large)", done.stderr, re.M), (
            done.stderr
        )
    ends_as_if_nothing_had_happened(folder, out)


READ_ONLY = """
run=$1; shift
mount --bind "$run" "$run" && mount -o remount,ro,bind "$run" || exit 99
exec "$@"
"""


@ONE
@trials(1, 8)
def test_07_read_only(folder, trial):
    run = folder / f"read-only {trial}"
    process = begin(folder, run, 20 + 20 * trial)
    process.kill(), process.communicate()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = enclosed(READ_ONLY, run, *tiny.command(folder / "tiny.py", "--run", run))
    if done is not None:
        assert done.returncode == 2 and re.fullmatch(r"error: .*Read-only file system.*\n", done.stderr), done.stderr
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    ends_as_if_nothing_had_happened(folder, run)


@ONE
@trials(1, 20)
def test_08_two_runs_in_one_folder(folder, trial):
    """The second is refused by name; where the first was killed, its lock is nobody's."""
    draw, run = random.Random(trial), folder / f"two {trial}"
    first = begin(folder, run, draw.randrange(1, 100))
    first.send_signal(signal.SIGSTOP)  # it is there, and does not come to its end
    second = tiny.run(folder / "tiny.py", "--run", run)
    refusal = f"error: {run} is in use by process {first.pid} on {socket.gethostname()}"
    assert second.returncode == 2 and second.stderr.startswith(refusal) and second.stderr.count("\n") == 1
    first.send_signal(signal.SIGCONT)
    if trial % 2:
        first.kill(), first.communicate()
        ends_as_if_nothing_had_happened(folder, run)
    else:
        first.communicate(timeout=200)
        assert first.returncode == 0 and difference(folder / "long", run) is None


# Several processes.

TEN = {"train__steps": 10, "train__checkpoint_every": 4, "train__eval_every": 5}
LAYOUTS = (
    Mesh(), Mesh(data=1, fsdp=8), Mesh(data=4, model=2), Mesh(data=1, fsdp=4, model=2), Mesh(data=4, sequence=2),
    Mesh(data=2, sequence=2, model=2), Mesh(data=2, fsdp=2, model=2), Mesh(data=2, fsdp=4),
)  # fmt: skip
COUNTS = (1, 2, 4)


@pytest.fixture(scope="module")
def crowds(tmp_path_factory):
    """With `whole`, a run of one process and eight devices."""
    folder = tmp_path_factory.mktemp("crowds")
    tiny.train(crowd.experiment(folder, **TEN), folder / "whole", console=tiny.quiet())
    return folder


def arguments(folder: Path, run: Path, mesh: Mesh = LAYOUTS[0]) -> list[object]:
    config = folder / f"{abs(hash(mesh))}.py"
    config.write_text(crowd.settings.render(crowd.experiment(folder, **TEN, mesh=mesh)))
    return [config, "--run", run]


def started(folder: Path, run: Path, count: int, *, until: int, more: tuple = ()) -> Crowd:
    crowded = Crowd(count, 8 // count, *arguments(folder, run), *more)
    while all(p.poll() is None for p in crowded.processes) and len(losses(run)) < until:
        time.sleep(0.01)
    return crowded


def resumed(folder: Path, run: Path, count: int, mesh: Mesh = LAYOUTS[0]) -> None:
    for ended in Crowd(count, 8 // count, *arguments(folder, run, mesh)).ended():
        assert ended.status == 0, ended.err


@pytest.fixture(scope="module")
def saved(crowds):
    """Runs that were stopped at step 4 of ten, by layout and number of processes; each is made once."""
    made: dict[tuple[Mesh, int], Path] = {}

    def of(mesh: Mesh, count: int) -> Path:
        if (mesh, count) not in made:
            run = made[mesh, count] = crowds / f"saved {len(made)}"
            for ended in Crowd(count, 8 // count, *arguments(crowds, run, mesh), program=STOPS).ended():
                assert ended.status == 128 + signal.SIGTERM, ended.err
            assert 4 <= int(newest(run).name) < 10  # several leave together, some steps later
        return made[mesh, count]

    return of


STOPS = """
import os, signal, sys
import crowd
from training import log

def then(self, step, metrics, write=log.Log.write):
    write(self, step, metrics)
    if step == 4 and "kind" not in metrics:
        os.kill(os.getpid(), signal.SIGTERM)
log.Log.write = then
sys.exit(crowd.main())
"""


@SEVERAL
@trials(0, 48)
def test_10_other_devices(crowds, saved, trial):
    """Saved on one mesh by so many processes, gone on with on another: the same batches, and so the same losses."""
    here = LAYOUTS[trial % 8], COUNTS[trial // 8 % 3]
    there = LAYOUTS[(trial + 1 + 3 * (trial // 24)) % 8], COUNTS[(trial // 8 + 1 + trial // 24) % 3]
    run = copied(saved(*here), crowds / f"elastic {trial}")
    resumed(crowds, run, there[1], there[0])
    want = losses(crowds / "whole")
    assert losses(run).keys() == want.keys()
    np.testing.assert_allclose([*losses(run).values()], [*want.values()], rtol=1e-6)
    shutil.rmtree(run)


@SEVERAL
@trials(0, 20)
def test_13_a_process_that_is_lost(crowds, trial):
    """Killed after a random step: all leave within the heartbeat and five seconds, and the same command goes on."""
    draw, count, heartbeat = random.Random(trial), (2, 4)[trial % 2], 4
    run = crowds / f"lost {trial}"
    crowded = started(crowds, run, count, until=draw.randrange(1, 6), more=(f"--processes.heartbeat={heartbeat}",))
    crowded.processes[draw.randrange(count)].kill()
    died = time.monotonic()
    while any(p.poll() is None for p in crowded.processes) and time.monotonic() - died < 60:
        time.sleep(0.01)
    assert time.monotonic() - died < heartbeat + 5
    for ended in crowded.ended():
        assert ended.status in (0, processes.LOST, -signal.SIGABRT, -signal.SIGKILL), ended.err
    resumed(crowds, run, count)
    np.testing.assert_allclose([*losses(run).values()], [*losses(crowds / "whole").values()], rtol=1e-6)

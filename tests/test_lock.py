"""The lock of a run's folder: one holder, who is known to live, and who learns that it was taken for dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import lock
from training.checkpoint import CheckpointError
from training.lock import RunLock

ROOT = Path(__file__).parents[1]

_HOLDER = """
import sys, time
from training.hush import hush
from training.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_recovered(tmp_path, caplog):
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process, process.stdout as lines:
        assert lines.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by process {process.pid} on {socket.gethostname()}"):
            RunLock(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    with RunLock(tmp_path):
        assert f"process {process.pid} on {socket.gethostname()}" in caplog.text and "taking over" in caplog.text
        with pytest.raises(CheckpointError, match="in use by process"):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def held_by(folder: Path, **other: object) -> Path:
    """A lock whose holder is another than this process in what is said."""
    path = folder / "lock"
    path.write_text(json.dumps(lock._myself() | other))
    return path


def test_a_reused_pid_is_no_holder(tmp_path):
    path = held_by(tmp_path, pid=os.getppid(), born="1")
    with RunLock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"boot": "another"}, {"pids": "pid:[1]"}], ids=str)
def test_where_pids_say_nothing_a_lock_that_is_touched_is_believed(tmp_path, monkeypatch, caplog, where):
    """On another host; on this one, in another container, or before the machine started anew."""
    path = held_by(tmp_path, pid=1 << 30, **where)
    monkeypatch.setattr(time, "sleep", lambda _: path.touch())
    with pytest.raises(CheckpointError, match=f"in use by process {1 << 30} on .*touching its lock"):
        RunLock(tmp_path).__enter__()
    monkeypatch.undo()
    assert "waiting to see whether it lives" in caplog.text
    silent = time.time() - lock.SILENCE_SECONDS - 5
    os.utime(path, (silent, silent))
    with RunLock(tmp_path):
        pass
    held_by(tmp_path, pid=1 << 30, **where)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.1)
    with RunLock(tmp_path):
        pass


def test_a_holder_that_was_taken_for_dead_ends_itself(tmp_path, monkeypatch, capsys):
    ended = []

    def end(status):
        ended.append(status)
        mine._over.set()

    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock.processes, "end", end)
    with RunLock(tmp_path) as mine:
        time.sleep(0.05)
        assert mine.lost() == "" and not ended
        (tmp_path / "theirs").mkdir()
        os.replace(held_by(tmp_path / "theirs", pid=7, host="elsewhere"), tmp_path / "lock")
        mine._heart.join(10)
    assert ended == [2]
    said = f"{tmp_path} was taken over by process 7 on elsewhere while this one stood still"
    assert capsys.readouterr().err == f"error: {said}: nothing more is written here\n"
    assert "elsewhere" in (tmp_path / "lock").read_text()


def test_a_lock_cut_short_is_free(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 12')
    with RunLock(tmp_path):
        pass

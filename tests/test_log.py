"""The record of a run, its trackers, its signals and its pictures."""

import errno
import io
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import types
import xml.etree.ElementTree
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from training.figures import by_context, loss_curve, position_curve, smoothed
from training.log import DAMAGED, METRICS, Log, Progress, read
from training.stop import Stop

ROOT = Path(__file__).parents[1]


def plain(folder: Path) -> Log:
    return Log(folder, tensorboard=False)


# metrics.jsonl


def test_every_digit_survives(tmp_path):
    single = np.float32(0.1)
    with plain(tmp_path) as log:
        log.write(1, {"loss": 0.1 + 0.2, "single": single, "device": jnp.float32(1 / 3), "count": np.int64(7)})
        log.write(2, {"kind": "eval", "loss": 1e-300, "nll_by_position": jnp.asarray([0.5, 1 / 3]), "text": "a\nb"})
    first, second = read(tmp_path)
    assert first["loss"] == 0.1 + 0.2 and first["single"] == float(single) and first["count"] == 7
    assert np.float32(first["device"]) == np.float32(1 / 3)
    assert second["kind"] == "eval" and second["loss"] == 1e-300 and second["text"] == "a\nb"
    assert second["nll_by_position"] == [0.5, float(np.float32(1 / 3))]


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with plain(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf, "list": np.array([-np.inf, 1.0], np.float32)})

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": "nan", "norm": "inf", "list": ["-inf", 1.0]}
    (line,) = read(tmp_path)
    assert math.isnan(line["loss"]) and line["norm"] == math.inf and line["list"] == [-math.inf, 1.0]


def test_rewind_drops_later_lines_and_a_partial_one(tmp_path):
    with plain(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step})
            log.write(step, {"kind": "eval", "loss": 2 / step})
    before = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 2, "lo')
    with plain(tmp_path) as log:
        log.rewind(3)
        assert (tmp_path / METRICS).read_bytes() == b"".join(before[:6])
        log.write(4, {"loss": 9.0})
    assert [line["step"] for line in read(tmp_path)] == [1, 1, 2, 2, 3, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_a_partial_line_is_not_read_and_not_continued(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.')
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}] and read(tmp_path / "absent") == []
    with plain(tmp_path) as log:
        log.write(2, {"loss": 1.5})
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    path.write_text('{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(tmp_path)


def test_lines_that_rotted_are_put_aside(tmp_path, caplog):
    path, rotten = tmp_path / METRICS, [b'{"step": 2, "l\xff\x00s": 1.0}\n', b"[" * 50_000 + b"\n", b'{"step": "3"}\n']
    first, third, late = (b'{"step": %d, "loss": 1.0}\n' % step for step in (1, 3, 5))
    for _ in range(2):
        path.write_bytes(b"".join([first, rotten[0], third, *rotten[1:], late]))
        caplog.clear()
        with plain(tmp_path) as log:
            log.rewind(4)
            log.write(5, {"loss": 2.0})
        assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(1, 1.0), (3, 1.0), (5, 2.0)]
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning == f"{path}: lines that cannot be read are now in {DAMAGED}: 3"
    assert (tmp_path / DAMAGED).read_bytes() == b"".join(rotten * 2)


def test_kill_loses_nothing_written(tmp_path):
    code = (
        "import sys; from training.log import Log\n"
        "log = Log(sys.argv[1], tensorboard=False)\n"
        "for step in range(10**9): log.write(step, {'loss': 1 / (step + 1)}); print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process, process.stdout as lines:
        for _ in range(100):
            lines.readline()
        process.kill()
        last = [99, *(int(line) for line in lines.read().split("\n")[:-1])][-1]
    found = read(tmp_path)
    assert len(found) > last and found == [{"step": step, "loss": 1 / (step + 1)} for step in range(len(found))]


def test_a_full_disk_costs_lines_but_not_the_run(tmp_path, monkeypatch, caplog):
    write = os.write

    def full(descriptor, content):
        if len(content) > 8:
            return write(descriptor, content[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    with plain(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda d, c: full(d, c) if c.startswith(b"{") else full(d, b""))
            log.write(2, {"loss": 1.0})
            log.write(3, {"loss": 1.0})
        log.write(4, {"loss": 1.0})
    assert [line["step"] for line in read(tmp_path)] == [1, 4]
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]


# Trackers


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboardX.proto.event_pb2 import Event

    found: dict = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the record, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + length :]
    return found


def test_tensorboard(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"loss": 0.5, "list": [1.0]})
        log.write(1, {"kind": "eval", "loss": 0.25})
    assert scalars(tmp_path / "tensorboard") == {"train/loss": [(1, 0.5)], "eval/loss": [(1, 0.25)]}


def test_missing_and_failing_trackers_warn_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: (_ for _ in ()).throw(ConnectionError("unreachable"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Log(tmp_path, wandb="project") as log:
        for step in range(3):
            log.write(step, {"loss": 1.0})
    assert len(read(tmp_path)) == 3
    first, second = [record.getMessage() for record in caplog.records]
    assert "tensorboardX is not installed" in first and "unreachable" in second and "Weights & Biases" in second


def test_wandb_continues_its_page(tmp_path, monkeypatch):
    calls: list = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("metric", args, kwargs))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append("finish")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: calls.append(kwargs) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        with Log(tmp_path, tensorboard=False, wandb="project") as log:
            log.write(7, {"loss": 0.5})
    start, _, logged, finish, again, *_ = calls
    assert start["project"] == "project" and start["id"] == again["id"]
    assert logged == ("log", {"step": 7, "train/loss": 0.5}) and finish == "finish"


# The terminal


def test_plain_lines_without_a_terminal():
    out = io.StringIO()
    with Progress(100, start=10, every=3600, console=Console(file=out, width=40)) as progress:
        for step in range(11, 101):
            progress.update(step, loss=2.0, tokens_per_second=12345.6)
        progress.print("saved [at 100]")
    first, last, said = out.getvalue().splitlines()
    assert first.startswith("step 11/100  loss 2  12,346 tokens/s  eta 0:0") and last.startswith("step 100/100  loss 2")
    assert said == "saved [at 100]"


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with Progress(100, console=Console(file=out, width=100, force_terminal=True)) as progress:
        progress.update(40, loss=2.5)
        progress.print("a line")
    assert "loss 2.5" in out.getvalue() and "40/100" in out.getvalue() and "a line" in out.getvalue()


# Signals

_LOOP = """
import sys, time
from training.stop import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", stop.requested, flush=True)
    sys.stdin.readline()  # a save that takes as long as we like
    print("saved", flush=True)
"""


def loop() -> subprocess.Popen:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", _LOOP], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def heard(process: subprocess.Popen) -> str:
    """The next line on standard error that is not blank."""
    while (line := process.stderr.readline()) == "\n":
        pass
    return line


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_signal_saves_and_leaves(kind):
    with loop() as process:
        process.send_signal(kind)
        assert process.stdout.readline() == f"saving {kind.name}\n"
        out, _ = process.communicate("\n")
    assert out == "saved\n" and process.returncode == 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_is_answered_and_a_third_obeyed(kind):
    with loop() as process:
        process.send_signal(kind)
        assert process.stdout.readline() == f"saving {kind.name}\n" and "saving a checkpoint" in heard(process)
        process.send_signal(kind)
        assert "a save is under way" in heard(process)
        process.send_signal(kind)
        assert "leaving at once" in heard(process)
        assert process.wait() == 128 + kind


def test_earlier_handlers_come_back():
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == "SIGUSR1"
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_outside_the_main_thread_there_is_a_notice(caplog):
    before = signal.getsignal(signal.SIGTERM)

    def run():
        with Stop() as stop:
            assert stop.requested is None and signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "not the main thread" in caplog.text and caplog.records[0].levelno == logging.WARNING


# Pictures


def test_figures_are_drawn_and_say_what_they_show(tmp_path):
    random = np.random.default_rng(0)
    with plain(tmp_path / "run") as log:
        for step in range(1, 61):
            bits = 2 + 5 * math.exp(-step / 10) + 0.05 * random.normal()
            bits = math.nan if step == 30 else bits  # a skipped step
            log.write(step, {"loss": bits * math.log(2), "bits_per_byte": bits, "tokens": step * 1000})
            if step % 20 == 0:
                nll = (2 + np.arange(1, 65) ** -0.5) * math.log(2)
                loss = nll.mean()
                log.write(
                    step,
                    {"kind": "eval", "loss": loss, "bits_per_byte": loss / math.log(2), "nll_by_position": nll},
                )
    loss = loss_curve(tmp_path / "run", references={"bigram": 3.4, "zlib": 2.4, "xz": 2.39}, title="A <run>")
    position = position_curve(tmp_path / "run")
    for path, words in (
        (loss, {"bits per byte", "bigram 3.40", "zlib 2.40", "xz 2.39", "training", "tokens", "step", "A <run>"}),
        (position, {"held-out bits per byte", "tokens of context", "step 60", "run"}),
    ):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
        tree = xml.etree.ElementTree.parse(path.with_suffix(".svg"))
        assert words <= {(element.text or "").strip() for element in tree.iter()}
    again = loss.with_suffix(".svg").read_bytes()
    loss_curve(tmp_path / "run", references={"bigram": 3.4, "zlib": 2.4, "xz": 2.39}, title="A <run>")
    assert loss.with_suffix(".svg").read_bytes() == again


def test_short_and_empty_runs(tmp_path):
    with pytest.raises(ValueError, match="no training lines"):
        loss_curve(tmp_path)
    with pytest.raises(ValueError, match="no evaluation"):
        position_curve(tmp_path)
    with plain(tmp_path) as log:
        log.write(1, {"loss": 3.0})
    assert loss_curve(tmp_path, references={"zlib": 2.4}).exists()
    assert "zlib" not in (tmp_path / "figures" / "loss.svg").read_text()  # bits per byte, beside nats per token


def test_smoothing_keeps_lines_and_drops_spikes():
    line = np.linspace(3.0, 1.0, 200)
    np.testing.assert_allclose(smoothed(line), line, rtol=1e-12)
    spiked = line.copy()
    spiked[100] = 50.0
    np.testing.assert_allclose(smoothed(spiked), line, atol=0.02)


def test_bins_average_what_is_asked():
    values = np.where(np.arange(512) % 2, 3.0, 0.0)
    x, y = by_context(values)
    np.testing.assert_allclose(y, 3.0)
    assert x[0] == pytest.approx(2) and 400 < x[-1] <= 512 and np.all(np.diff(x) > 0)

"""The benchmarks' own harness, with contestants of numpy: who is wrong gets no number, and the table says so."""

import io

import numpy as np
import pytest
from rich.console import Console

from benchmarks import cases, cpu, ops, pair, report
from benchmarks.peers import Peer

CONTESTANT = """
import sys
import io

import numpy as np
from benchmarks.pair import Loaded, pin, serve

pin()
fault = sys.argv[1] if len(sys.argv) > 1 else ""

def load(op, mode, inputs, T=None, **options):
    if fault == "dies":
        sys.exit("out of luck")
    print("noise that a library makes on stdout")
    factor = 1.001 if fault == "wrong" else 1.0
    x = inputs["v"]
    y = {"y": x * factor}
    if mode == "fwd+bwd":
        y["d_v"] = inputs["cotangent"] * (np.nan if fault == "nan" else 1)
    return Loaded(lambda: np.sort(x, axis=1), lambda: y, {"compile_s": 0.5, "temp_mb": 2.0, "io_mb": 1.0})

serve(load, lambda: {"numpy": np.__version__})
"""


@pytest.fixture
def lane(tmp_path, monkeypatch):
    """A lane whose contestants, ours and theirs, are the module above; `lane("wrong")` gives theirs a fault."""
    (tmp_path / "contestant.py").write_text(CONTESTANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ops.Lane, "ours", lambda self: pair.Contestant("contestant", core=self.core))
    (tmp_path / "inputs").mkdir()

    def build(fault: str = "", missing: str = "") -> ops.Lane:
        peer = Peer("contestant", (fault,), pair.sys.executable, missing)
        return ops.Lane(None, tmp_path / "inputs", 2, {"torch": peer}, {}, {})

    return build


PAIR = cases.Pair("linear", "fwd+bwd", "torch", "a peer", goal=0.001, T=128)


def test_a_right_contestant_is_timed(lane):
    (row,) = ops.pairs([PAIR], lane())
    assert row.met and row.ours_ms and row.peer_ms and row.error == 0 and row.temp_mb == 2.0


@pytest.mark.parametrize("fault, why", [("wrong", "y differs by 1.0e-03"), ("nan", "d_v differs by inf")])
def test_the_gate_refuses_a_wrong_contestant(lane, fault, why):
    (row,) = ops.pairs([PAIR], lane(fault))
    assert row.met is False and row.ours_ms is None and row.peer_ms is None and row.result == ""
    assert why in row.note


def test_a_contestant_that_dies_is_reported(lane):
    (row,) = ops.pairs([PAIR], lane("dies"))
    assert row.met is False and "out of luck" in row.note


def test_without_the_peer_our_time_alone(lane):
    (row,) = ops.pairs([PAIR], lane(missing="peer not installed: make bench-peers"))
    assert row.ours_ms and row.peer_ms is None and row.met is None and "make bench-peers" in row.note


def test_gate_refuses_another_shape_or_another_set_of_outputs():
    y = {"y": np.ones((2, 3), np.float32)}
    assert pair.gate(y, y) == 0
    with pytest.raises(pair.Failed, match=r"y is \(2, 3\) against \(3, 2\)"):
        pair.gate(y, {"y": np.ones((3, 2), np.float32)})
    with pytest.raises(pair.Failed, match="d_q"):
        pair.gate(y, y | {"d_q": y["y"]})


def test_ratio_is_the_median_within_rounds():
    times = pair.Times([[1.0, 2.0], [10.0, 30.0], [1.0, 9.0]])  # one round on a busy machine
    assert times.ratio(1) == 3.0 and times.median(0) == 1.0 and times.best(1) == 2.0


def test_the_table_names_what_was_missed():
    rows = [
        report.Row("Operations", "fast one", peer="p", ours_ms=1.234, peer_ms=123.4, **report.at_least(100.0, 2.5)),
        report.Row("Operations", "slow one", ours_ms=0.5, note="a | b", **report.at_most(1.25, 1.1, "")),
    ]
    text = report.markdown(rows, {"command": "`x`"})
    assert "| item | peer | ours ms | peer ms | result | goal | met | note |" in text
    assert "| fast one | p | 1.23 | 123 | 100.00x | >= 2.5x | yes |  |" in text
    assert "| slow one |  | 0.50 |  | 1.25 | <= 1.1 | NO | a \\| b |" in text
    assert "1 of 2 goals met; missed: slow one" in text
    console = Console(record=True, width=150, file=io.StringIO())
    report.show(rows, console)
    assert "1 of 2 goals met; missed: slow one" in console.export_text()


def test_only_finds_parts_and_names_the_choice():
    assert {t.name for t in cpu.chosen("gdn")} == {"pairs.gdn", "lengths.gdn", "train.gdn"}
    assert {t.name for t in cpu.chosen("pairs.gdn,host")} == {"pairs.gdn", "host"}
    with pytest.raises(SystemExit, match="lengths"):
        cpu.chosen("gnd")


def test_paths_of_a_machine_stay_out_of_the_report():
    assert cpu.public(["--maxtext", "/a/b", "--torch-python=/c/d", "--rounds", "5"]) == [
        "--maxtext", "CHECKOUT", "--torch-python=PYTHON", "--rounds", "5",
    ]  # fmt: skip

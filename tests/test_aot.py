"""Compiling for pods that are not there: what is read from a program, what is said of it, and what is refused.

Those marked `aot` compile for TPUs by libtpu, which the suite's environment does not have: `make test-aot`.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pods
import pytest
import tiny
from flax import nnx
from rich.console import Console

from models.parameters import flatten
from tpu import ahead, chips, collectives, topology
from tpu.capture import standard_error
from tpu.compile import main
from tpu.floor import floor
from tpu.report import duration, fits, show, size
from tpu.results import page
from training.data import Text
from training.experiment import Mesh
from training.layout import build_layout
from training.prefix import PrefixText
from training.run import prepare
from training.settings import ROOT, ConfigError, load, locate
from training.summary import peak_flops

GOLDEN = pathlib.Path(__file__).parent / "golden" / "aot"
REWRITE = "ENGRAX_REWRITE_GOLDEN" in os.environ
GROWTH = 1.1  # of memory and of collectives: what other versions of XLA may add

HLO = """HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %r = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %cut = f32[2,16]{1,0:T(8,128)} dynamic-slice(%r), dynamic_slice_sizes={2,16}
}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %part = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %whole = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%s, %part)
}

%condition (s: (s32[], bf16[4,8])) -> pred[] {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(5)
  ROOT %go = pred[] compare(%n, %end), direction=LT
}

%forever (s: (s32[], bf16[4,8])) -> pred[] {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%piece (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=8, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="15"}
}

%small (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

%large (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sent = f32[4]{0} collective-permute(%p), channel_id=7, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}

ENTRY %main (a: bf16[4,8], b: f32[8,16], c: f32[4], i: s32[]) -> (f32[], bf16[4,8]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %c = f32[4]{0} parameter(2)
  %i = s32[] parameter(3)
  %start = (s32[], bf16[4,8]{1,0}) tuple(%i, %a)
  %loop = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %again = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body
  %unknown = (s32[], bf16[4,8]{1,0}) while(%start), condition=%forever, body=%body
  %first = f32[8]{0} fusion(%c), kind=kOutput, calls=%piece
  %second = f32[8]{0} fusion(%c), kind=kOutput, calls=%piece
  %scattered = f32[2,16]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %picked = f32[4]{0} conditional(%i, %c, %c), branch_computations={%small, %large}
  %sums = (f32[4]{0}, /*index=1*/f32[2]{0}) all-reduce-start(%c, %c), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %done = (f32[4]{0}, f32[2]{0}) all-reduce-done(%sums)
  %gathering = (f32[4]{0}, f32[8]{0}) all-gather-start(%c), channel_id=3, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %gathered = f32[8]{0} all-gather-done(%gathering)
  %kept = f32[2]{0} reduce-scatter(%gathered), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %turned = pred[16]{0} all-to-all(%a), channel_id=5, replica_groups={{0,2},{1,3}}, dimensions={0}
  ROOT %all = (f32[], bf16[4,8]{1,0}) tuple(%i, %a)
}
"""  # noqa: E501


def test_collectives_are_read():
    account = collectives.read(HLO, [0, 0, 1, 1])
    said = account.by_kind()
    # 12 turns of a loop, 5 of another, 1 of one whose length is not known; an asynchronous one, among 0, 2 and 1, 3;
    # and one in two pieces, among 0, 1 and 2, 3.
    assert said["all-gather"]["runs"] == 20 and said["all-gather"]["instructions"] == 5
    assert said["all-gather"]["bytes"] == 18 * 16 * 8 * 2 + 8 * 4 + 8 * 4
    assert said["all-gather"]["sent"] == 18 * 256 * 3 // 4 + 32 // 2 + 32 // 2
    assert said["all-gather"]["across_slices"] == said["all-gather"]["bytes"] - 32
    assert said["all-reduce"] == {"instructions": 1, "runs": 1, "bytes": 24, "sent": 24, "across_slices": 0}
    scattered = {"instructions": 2, "runs": 2, "bytes": 8 * 16 * 4 + 8 * 4, "sent": 384 + 24}
    assert said["reduce-scatter"] == scattered | {"across_slices": 544}
    assert said["all-to-all"] == {"instructions": 1, "runs": 1, "bytes": 16, "sent": 8, "across_slices": 16}
    assert said["collective-permute"]["sent"] == 16 and said["collective-permute"]["across_slices"] == 0
    assert account.uncounted == 1
    assert account.sent == pytest.approx(sum(kind["sent"] for kind in said.values()))


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups(attribute, groups):
    line = f"%x), channel_id=1, replica_groups={attribute}, dimensions={{0}}"
    assert collectives.groups_of(line, 8) == groups


def test_the_floor_by_hand():
    chip = chips.Chip(flops=100.0, memory=10.0, interconnect=2.0, usable=1, dimensions=2)
    least = floor(chip, flops=300, moved=20, sent=10)
    assert least == (3, 2, 5) and least.seconds == 5 and least.bound == "interconnect"
    half = floor(dataclasses.replace(chip, devices=2), flops=300, moved=20, sent=1)
    assert half == (6, 4, 1) and half.bound == "compute"


def test_chips_agree_with_what_training_says_of_their_peak():
    """By the names that libtpu gives them."""
    names = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    assert names.keys() == chips.CHIPS.keys()
    for kind, name in names.items():
        devices = np.array([SimpleNamespace(device_kind=name)] * 6)
        chip = chips.CHIPS[kind]
        assert peak_flops(SimpleNamespace(devices=devices)) == 6 * chip.flops / chip.devices
    assert peak_flops(build_layout(Mesh(data=2), 8, 8).mesh) is None  # of a CPU nobody says


def test_topologies():
    assert topology.read("v5e:4x4", 2) == ("v5e:4x4", "v5e", (4, 4), 2)
    assert topology.read("v5e:4x4", 2).chips == 32
    assert topology.read("v5p:4x4x8").chips == 128


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v5e:16", "v9:2x2", "v5e:3x5", "v5e:4x4x4", "v5p:4x4", "v4:4x4x2"])
def test_topologies_that_do_not_exist(name):
    with pytest.raises(ConfigError, match="^topology is .*(give a chip|comes in)"):
        topology.read(name)


NO_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="says what is said without libtpu"
)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["quickstart"], "topology is missing: this config states no pod; give --topology, such as v5e:4x4"),
        (["titans_lmm@170M", "--pod", "v5e:9x9"], "topology is 'v5e:9x9': v5e comes in"),
        pytest.param(["titans_lmm@170M"], "libtpu is missing: pip install engrax's tpu", marks=NO_LIBTPU),
        (["quickstart", "--topology", "v5e:9x9"], "topology is 'v5e:9x9': v5e comes in 1x1, 2x2, 2x4"),
        (["quickstart", "--topology", "v5e:2x2", "--slices", "0"], "slices is 0: it must be at least 1"),
        (["quickstart", "--topology", "v5e:2x2", "--model.X", "1"], "there is no field --model.X"),
        (["quickstar", "--topology", "v5e:2x2"], "there is no config 'quickstar': did you mean quickstart?"),
        (["--topology", "v5e:2x2"], "the first argument is a config, not '--topology'"),
        pytest.param(
            ["quickstart", "--topology", "v5e:2x2"], "libtpu is missing: pip install engrax's tpu", marks=NO_LIBTPU
        ),
    ],
)
def test_one_line_for_what_cannot_be_compiled(capsys, monkeypatch, arguments, reason):
    monkeypatch.setattr(topology, "ENVIRONMENT", {})  # this process has its own
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {reason}") and said.err.count("\n") == 1


def test_usage(capsys):
    assert main([]) == 0 and "--topology" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
            "24.00G of 15.75G hbm. Exceeds hbm capacity by 8.25G.\n\nTotal hbm usage >= 24.50G:",
            "it does not fit: a device would need 24.00G of HBM and has 15.75G, 8.25G too much",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00G) "
            "exceeds available HBM (15.75G).",
            "it does not fit: a device would need 512.00G of HBM and has 15.75G",
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_does_not_fit_is_one_line(message, line):
    assert ahead.out_of_memory(message) == line


def test_outlines_need_no_files():
    text = Text(source="nowhere", tokenizer="nowhere.json").outline(1000)
    assert (text.words, text.labelled, text.prefix, len(text.token_bytes)) == (1000, None, 0, 1000)
    assert PrefixText(source="nowhere", prefix=7).outline(10).prefix == 7


def small(folder, **changes):
    return tiny.experiment(folder, **{"data__B": 8, "mesh": Mesh(fsdp=4, model=2)} | changes)


def test_the_step_is_the_one_that_training_runs(tmp_path):
    """Compiled from shapes alone, for data that does not exist, and compiled by a run: the same program."""
    experiment = small(tmp_path)
    job = prepare(experiment)
    run = job.step.lower(job.state, jax.tree.map(jax.numpy.asarray, job.dataset.batch(0, 0))).compile()
    expected = collectives.read(run.as_text(), [0] * 8).by_kind()
    assert sum(kind["runs"] for kind in expected.values()) > 0
    elsewhere = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, source="nowhere"))
    report = ahead.compile_step(elsewhere, jax.devices(), chips.CHIPS["v5e"])
    assert report["collectives"] == expected
    assert {name: report["memory"][name] for name in ("arguments", "aliased")} == {
        name: ahead.memory_of(run)[name] for name in ("arguments", "aliased")
    }
    assert report["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "model": 2} and report["rematerialised"] == 0
    assert sum(held["parameters"] for held in report["sharded"].values()) == report["parameters"]
    assert report["floor"]["seconds"] > 0

    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with console.file:
        show(console, {"config": "tiny", "topology": "v5e:2x4", "slices": 1, **report})
    said = console.export_text()
    for words in ("mesh fsdp 4, model 2", "fits:", "bound by", "all-reduce", "D over fsdp"):
        assert words in said


def test_meshes_that_do_not_divide(tmp_path):
    with pytest.raises(ConfigError, match="mesh.data = 3 do not fit 8 devices"):
        ahead.compile_step(small(tmp_path, mesh=Mesh(data=3)), jax.devices(), None)
    with pytest.raises(ConfigError, match="data.B is 6, which does not divide over mesh.fsdp = 4"):
        ahead.compile_step(small(tmp_path, data__B=6), jax.devices(), None)
    with pytest.raises(ConfigError, match="data.B is 12, which does not divide over train.accumulate x mesh.fsdp = 8"):
        ahead.compile_step(small(tmp_path, data__B=12, train__accumulate=2), jax.devices(), None)


def test_code_hears_the_backend_that_it_is_compiled_for():
    with ahead.tracing_for("tpu"):
        assert jax.default_backend() == "tpu"
    assert jax.default_backend() == "cpu"


def test_what_xla_writes_to_standard_error_is_read(capfd):
    with standard_error() as said:
        os.write(2, f"W0000 [SPMD] I{ahead.REMATERIALISED}. The compiler\n".encode())
    assert said.text.count(ahead.REMATERIALISED) == 1 and capfd.readouterr().err == ""


def test_units():
    assert [size(count) for count in (0, 1536, 3 << 29)] == ["0 B", "1.50 KiB", "1.50 GiB"]
    assert [duration(seconds) for seconds in (2e-6, 0.25)] == ["2.0 µs", "250.0 ms"]
    assert fits({"usable": 100, "memory": {"peak": 120, "program": 10}}).startswith("does not fit: 30 B more")


def test_the_order_of_devices_is_that_of_training():
    assert build_layout(Mesh(), 8, 8, jax.devices()).mesh == build_layout(Mesh(), 8, 8).mesh


CASES = {
    "data": [],
    "fsdp": ["--mesh.fsdp", "4"],
    "fsdp and model": ["--mesh.fsdp", "2", "--mesh.model", "2"],
    "fsdp and sequence": ["--mesh.fsdp", "2", "--mesh.sequence", "2"],
}


@pytest.mark.aot
@pytest.mark.parametrize("name", CASES)
def test_memory_and_collectives_do_not_grow(tmp_path, name):
    """Of a small model on four chips of v5e. Less is fine; ENGRAX_REWRITE_GOLDEN=1 writes the files anew."""
    config = tmp_path / "small.py"
    config.write_text(SMALL)
    path = tmp_path / "report.json"
    asked = [
        "-m",
        "tpu.compile",
        str(config),
        "--topology",
        "v5e:2x2",
        "--json",
        str(path),
        *CASES[name],
    ]
    ended = subprocess.run([sys.executable, *asked], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(path.read_text())
    assert report["rematerialised"] == 0
    found = {part: report[part] for part in ("memory", "collectives", "versions")}
    golden = GOLDEN / f"{name}.json"
    if REWRITE:
        golden.write_text(json.dumps(found, indent=2) + "\n")
    kept = json.loads(golden.read_text())
    for part in ("arguments", "outputs", "temporaries", "peak"):
        assert found["memory"][part] <= GROWTH * kept["memory"][part], part
    for kind, said in kept["collectives"].items():
        assert found["collectives"][kind]["bytes"] <= GROWTH * said["bytes"], kind


SMALL = '''"""A small model."""

from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import AdamW, Experiment

config = Experiment(
    description="Small.",
    model=LM(
        W=512, D=256, stages=(Stage((GatedDeltaNet(H=4), MLP()), repeats=4),), dtype="bfloat16", scan_layers="always"
    ),
    data=Text(T=256, B=8, source="nowhere"),
    optimizer=AdamW(),
)
'''


@pytest.mark.aot
def test_what_xla_cannot_split_is_seen():
    """libtpu logs to a file unless told otherwise: then no step would ever be found at fault."""
    ended = subprocess.run([sys.executable, "-c", INVOLUNTARY], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0 and int(ended.stdout) > 0, ended.stderr


INVOLUNTARY = """
from tpu import topology
devices = topology.devices(topology.read("v5e:4x4"))

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from tpu.ahead import REMATERIALISED
from tpu.capture import standard_error

mesh = Mesh(np.array(devices).reshape(2, 2, 4), ("a", "b", "c"))

def turn(x):
    for axes in (P("a", "b"), P(None, ("c", "b")), P("c", "a")):
        x = jax.lax.with_sharding_constraint(jax.numpy.sin(x), NamedSharding(mesh, axes))
    return x

with standard_error() as said:
    jax.jit(turn).lower(jax.ShapeDtypeStruct((64, 128), np.float32)).compile()
print(said.text.count(REMATERIALISED))
"""


def test_the_page_of_results_is_made_from_its_reports():
    folder = ROOT / "results" / "aot"
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert reports and (folder / "README.md").read_text() == page(reports) + "\n"


def of(report):
    """The experiment of a report, as its config states it."""
    name, _, size = report["config"].partition("@")
    return load(locate(name), size)


def test_what_is_estimated_of_pods_was_compiled_for_some():
    """Each on the pod and the mesh that its config states. The estimate is above, and not far."""
    for path in sorted((ROOT / "results" / "aot").glob("*.json")):
        report = json.loads(path.read_text())
        experiment = of(report)
        assert experiment.pod == report["topology"]
        assert dict(pods.abstract(experiment, report["devices"]).shape) == report["mesh"]
        shapes = jax.eval_shape(lambda model=experiment.model: model.build(rngs=nnx.Rngs(0)))
        estimate = pods.estimate(experiment, *flatten(shapes), report["devices"])
        assert 0.75 * estimate < report["memory"]["peak"] < estimate, path.stem


@pytest.mark.aot
@pytest.mark.parametrize("name", ["titans_lmm@170M_v5e_4x4", "lizard@8B_v5p_2x2x2"])
def test_paper_sizes_compile_for_the_pods_that_they_state(tmp_path, name):
    """By their names alone, minutes each."""
    kept = json.loads((ROOT / "results" / "aot" / f"{name}.json").read_text())
    path = tmp_path / "report.json"
    asked = ["-m", "tpu.compile", kept["config"], "--json", str(path)]
    ended = subprocess.run([sys.executable, *asked], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(path.read_text())
    assert found["mesh"] == kept["mesh"] and found["memory"]["peak"] <= GROWTH * kept["memory"]["peak"]


def test_every_golden_report_has_its_case():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)

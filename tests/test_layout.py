"""Layouts: the same run on every mesh, each parameter where the rules put it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens
from layers.ops.place import AXES
from models.lm import LM, Stage
from models.parameters import Spec
from training.data import Batch, DataConfig, Dataset
from training.experiment import AdamW, Experiment, Mesh, Muon, Schedule, Train
from training.layout import build_layout
from training.run import prepare
from training.summary import held, where

W, D, B, T = 32, 16, 16, 6


@dataclasses.dataclass(frozen=True)
class Noise(DataConfig):
    T: int = T
    B: int = B

    def build(self) -> Dataset:
        return NoiseDataset()


class NoiseDataset(Dataset):
    words, digest, token_bytes = W, "noise", np.ones(W, np.int32)

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        ids, labels = np.random.default_rng((seed, step)).integers(0, W, (2, B, T), np.int32)
        return Batch(ids, np.tile(np.arange(T, dtype=np.int32), (B, 1)), labels)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        yield self.batch(1, 0)


@dataclasses.dataclass(frozen=True)
class Heads(LayerConfig):
    """H heads that multiply what G groups say, and F hidden channels: all letters, and a program that compiles fast."""

    def build(self, D: int, *, rngs: nnx.Rngs) -> "HeadsLayer":
        return HeadsLayer(D, rngs=rngs)


class HeadsLayer(Layer):
    def __init__(self, D: int, *, rngs: nnx.Rngs):
        self.query = Einsum("BTD,DHK->BTHK", D=D, H=4, K=4, rngs=rngs)
        self.key = Einsum("BTD,DGK->BTGK", D=D, G=2, K=4, rngs=rngs)
        self.down = Einsum("BTF,FD->BTD", D=D, F=24, residual=True, rngs=rngs)
        self.out = Einsum("BTHK,HKD->BTD", D=D, H=4, K=4, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> tuple[()]:
        return ()

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, state: Any = None) -> Out:
        key_BTHK = jnp.repeat(jnp.cumsum(self.key(x_BTD), 1), 2, axis=2)
        query_BTHK = self.query(x_BTD)
        hidden_BTF = jnp.tanh(jnp.concatenate([query_BTHK[:, :, 0], query_BTHK[:, :, 1]] * 3, -1))
        return Out(self.out(query_BTHK * key_BTHK) + self.down(hidden_BTF), state)


MODEL = LM(W=W, D=D, stages=(Stage((Heads(),), repeats=2),), tied=True, scan_layers="always")
# An eps that small differences of the gradient do not pass.
ADAM = AdamW(lr=1e-2, eps=1e-2, schedule=Schedule(warmup=0, shape="constant"))
MESHES = {
    "one device": Mesh(data=1),
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "model": Mesh(data=4, model=2),
    "fsdp and model": Mesh(data=1, fsdp=-1, model=2),
    "sequence too": Mesh(fsdp=2, sequence=2, model=2),
}


def experiment(mesh, **changes):
    return Experiment("A test.", **{"model": MODEL, "data": Noise(), "optimizer": ADAM, "mesh": mesh} | changes)


@functools.cache
def trained(name):
    """(job, first parameters, losses and gradient norms of three steps, state after them)"""
    job = prepare(experiment(MESHES[name], train=Train(accumulate=2 if name == "data" else 1)))
    state = job.init()
    first = jax.tree.map(np.asarray, state["params"])
    said = []
    for step in range(3):
        state, metrics = job.step(state, job.dataset.batch(0, step))
        said.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return job, first, np.array(said), state


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one device"])
def test_a_run_is_the_same_on_every_mesh(name):
    _, first, said, state = trained("one device")
    _, other_first, other_said, other_state = trained(name)
    for parameter, value in first.items():
        np.testing.assert_array_equal(other_first[parameter], value, err_msg=parameter)
    np.testing.assert_allclose(other_said, said, rtol=1e-5)
    for parameter, value in state["params"].items():
        value, other = np.asarray(value), np.asarray(other_state["params"][parameter])
        assert np.abs(value - first[parameter]).max() > 1e-4
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=parameter)


QUERY, KEY, OUT, DOWN = (
    f"stages.0.layers.{name}.w" for name in ("0.query", "0.key", "0.out", "0.down")
)  # LDHK, LDGK, LHKD, LFD
SHARDS = {  # what one device of each mesh holds
    "data": {"embed": (32, 16), QUERY: (2, 16, 4, 4), "norm.w": (16,)},
    "fsdp": {"embed": (32, 2), QUERY: (2, 2, 4, 4), OUT: (2, 4, 4, 2), DOWN: (2, 24, 2), "norm.w": (2,)},
    "model": {
        "embed": (16, 16),
        QUERY: (2, 16, 2, 4),
        KEY: (2, 16, 1, 4),
        OUT: (2, 2, 4, 16),
        DOWN: (2, 12, 16),
        "norm.w": (16,),
    },
    "fsdp and model": {
        "embed": (16, 4),
        QUERY: (2, 4, 2, 4),
        KEY: (2, 4, 1, 4),
        OUT: (2, 2, 4, 4),
        DOWN: (2, 12, 4),
        "norm.w": (4,),
    },
    "sequence too": {"embed": (16, 8), QUERY: (2, 8, 2, 4), DOWN: (2, 12, 8), "norm.w": (8,)},
}


@pytest.mark.parametrize("name", SHARDS)
def test_parameters_and_moments_lie_where_the_rules_say(name):
    job, _, _, state = trained(name)
    moments = state["opt"][1][0]
    for tree in (state["params"], moments.mu, moments.nu):
        for parameter, shape in SHARDS[name].items():
            array = tree[parameter]
            assert len(array.sharding.device_set) == 8
            assert {shard.data.shape for shard in array.addressable_shards} == {shape}, parameter
    assert moments.count.sharding.is_fully_replicated
    sizes = job.layout.mesh.shape
    part = (B // sizes["data"] // sizes["fsdp"], T // sizes["sequence"])
    batch = jax.device_put(job.dataset.batch(0, 0), job.layout.batch)
    assert all({s.data.shape for s in array.addressable_shards} == {part} for array in jax.tree.leaves(batch))


def test_momentum_of_muon_and_the_average_lie_as_the_parameters():
    job = prepare(experiment(MESHES["fsdp and model"], optimizer=Muon(), train=Train(ema=0.9)))
    for group in ("opt", "ema"):
        for path, leaf in jax.tree.leaves_with_path(job.state[group]):
            name = getattr(path[-1], "key", None)
            if name in job.structure.specs:
                assert leaf.sharding == job.state["params"][name].sharding, jax.tree_util.keystr(path)
            else:
                assert leaf.sharding.is_fully_replicated
    assert job.state["ema"][QUERY].sharding.shard_shape((2, 16, 4, 4)) == (2, 4, 2, 4)


def test_parts_of_a_batch_stay_on_their_devices():
    job = trained("data")[0]
    assert job.experiment.train.accumulate == 2
    text = job.step.lower(job.state, job.dataset.batch(0, 0)).compile().as_text()
    assert "all-reduce" in text
    for move in ("all-gather", "all-to-all", "collective-permute"):
        assert move not in text


@pytest.mark.parametrize(
    "mesh, rows, message",
    [
        (Mesh(data=-1, model=-1), 8, "mesh.data and mesh.model are both -1: fix one"),
        (Mesh(data=3), 9, "mesh.data = 3 do not fit 8 devices: .* must be one of 1, 2, 4, 8"),
        (Mesh(data=4, model=4), 8, "mesh.data = 4 and mesh.model = 4 do not fit 8 devices"),
        (Mesh(data=-1, model=5), 8, "mesh.model = 5 do not fit"),
        (Mesh(data=0), 8, "mesh.data = 0"),
        (Mesh(data=-2, model=-2), 8, "mesh.data = -2"),
        (Mesh(data=8), 12, "data.B is 12, which does not divide over mesh.data = 8: choose a multiple"),
        (Mesh(fsdp=4), 12, "data.B is 12, which does not divide over mesh.data x mesh.fsdp = 8: choose a multiple"),
        (Mesh(sequence=4), 8, "data.T is 6, which does not divide over mesh.sequence = 4: choose a multiple"),
    ],
)
def test_impossible_meshes(mesh, rows, message):
    with pytest.raises(ValueError, match=message):
        build_layout(mesh, rows, T)


def test_meshes_of_runs_saved_before_there_was_fsdp():
    assert Mesh(data=8, model=1, layout="fsdp") == Mesh(data=1, fsdp=8)
    assert Mesh(data=-1, model=2, layout="fsdp+tensor") == Mesh(data=1, fsdp=-1, model=2)
    assert Mesh(data=4, model=2, layout="tensor") == Mesh(data=4, model=2) == Mesh(data=4, model=2, layout="replicated")
    assert dataclasses.replace(Mesh(data=8, layout="fsdp"), model=2) == Mesh(data=1, fsdp=8, model=2)
    with pytest.raises(ValueError, match="Mesh.layout is 'both': say how many devices"):
        Mesh(layout="both")


def test_what_is_said_of_where_a_state_lies():
    job = trained("sequence too")[0]
    said = where(job.experiment, job.layout, job.structure.specs, job.state)
    assert said["layout"].startswith("D over fsdp, H over model: 1,024 parameters; D over fsdp, F over model: 768 ")
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(job.init()) for shard in leaf.addressable_shards[:1])
    assert said["memory"].startswith(f"{held / 2**20:,.1f} MiB a device for parameters and optimiser, ")
    assert said["batch"] == f"{B // 2} x {T // 2} tokens a device; rows over fsdp, tokens over sequence"
    assert said["activations"] == (
        f"residual stream {B // 2} x {T // 2} x {D} a device, kept by each of 2 blocks: 0.0 MiB, "
        "and what model.remat 'none' keeps within them"
    )
    alone = trained("one device")[0]
    assert where(alone.experiment, alone.layout, alone.structure.specs, alone.state).keys() == {"memory", "activations"}


def test_what_a_device_holds_of_a_step():
    """Of half a batch at a time, and four streams in bfloat16: one copy a block, whatever a block's layers."""
    model = LM(W=W, D=D, stages=(Stage((Heads(), Heads()), repeats=3), Stage((Heads(),))), dtype="bfloat16", streams=4)
    job = prepare(experiment(Mesh(data=2, fsdp=2, sequence=2), model=model, train=Train(accumulate=2)))
    found = held(job.experiment, job.layout, job.structure.specs, job.state)
    assert found.stream == (B // 2 // 4) * (T // 2) * D * 4 * 2 and found.kept == 4 * found.stream
    assert found.state > 2.9 * found.gradients > 0  # AdamW has two moments


def test_a_mesh_takes_the_devices_it_needs():
    devices = jax.devices()
    assert build_layout(Mesh(data=2), 8, T).mesh.devices.ravel().tolist() == devices[:2]
    assert list(build_layout(Mesh(model=4), 8, T).mesh.shape.items()) == list(zip(AXES, (2, 1, 1, 4), strict=True))
    assert build_layout(Mesh(), 3, T, devices[:1]).mesh.size == 1


def test_the_report_names_what_stays_whole():
    specs = trained("one device")[0].structure.specs
    lines = build_layout(Mesh(model=8), 8, T).report(specs)
    cure = "choose a multiple of 8, or another mesh.model"
    assert lines == [
        f"2 arrays such as {OUT} lie whole over mesh.model, 1,024 parameters: H = 4 does not divide over 8 devices; "
        + cure,
        f"{KEY} lies whole over mesh.model, 256 parameters: G = 2 does not divide over 8 devices; {cure}",
    ]
    assert build_layout(Mesh(fsdp=8), 8, T).report(specs) == []
    assert build_layout(Mesh(data=8), 8, T).report(specs) == []
    narrow = {name: spec._replace(shape=tuple(12 if n == D else n for n in spec.shape)) for name, spec in specs.items()}
    assert build_layout(Mesh(fsdp=4, model=2), 8, T).report(narrow) == []
    lines = build_layout(Mesh(fsdp=8), 8, T).report(narrow)
    assert len(lines) == 1 and f"{len(specs)} arrays such as " in lines[0]
    assert "D = 12 does not divide over 8 devices; choose a multiple of 8, or another mesh.fsdp" in lines[0]
    lines = build_layout(Mesh(data=2, model=4), 8, T).report({"w": Spec((6, 3), "FH", True, False, "F")})
    assert len(lines) == 1 and "F = 6 or H = 3 does not divide over 4 devices" in lines[0]
    assert build_layout(Mesh(data=2, model=4), 8, T).report({"w": Spec((8, 3), "FH", True, False, "F")}) == []


def test_the_report_names_what_is_whole_along_one_axis_of_two():
    """Split over fsdp, and not over model: that it is in parts at all must not hide it."""
    specs = {
        "query": Spec((16, 3, 4), "DHK", True, False, "D"),
        "out": Spec((3, 4, 16), "HKD", True, True, "HK"),
        "embed": Spec((257, 16), "WD", True, False, ""),
        "up": Spec((16, 24), "DF", True, False, "D"),
    }
    layout = build_layout(Mesh(fsdp=4, model=2), 8, T)
    assert all("fsdp" in layout.spec(spec) for spec in specs.values())
    lines = layout.report(specs)
    assert [line.partition(";")[0] for line in lines] == [
        "embed lies whole over mesh.model, 4,112 parameters: W = 257 does not divide over 2 devices",
        "2 arrays such as query lie whole over mesh.model, 384 parameters: H = 3 does not divide over 2 devices",
    ]

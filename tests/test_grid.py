"""Runs that are one program are each what they are alone."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.gla import GLA
from layers.linear import LinearAttention
from models.lm import LM, Stage
from models.parameters import flatten
from probes.grid import Arm, Grid
from probes.small_runs import SmallRun
from probes.tasks.recall import MQAR
from probes.tasks.task import Part, Probe
from training.experiment import AdamW, Muon, Schedule, Train

MODEL = LM(W=32, D=16, stages=(Stage((LinearAttention(H=2, K=4),)),), tied=True)
LAW = MQAR(32, 16, 2, filler="conflict_free")
DATA = Probe(B=4, train=(Part(LAW),), test=(Part(LAW, 8),))
ARMS = (Arm(0), Arm(1), Arm(0, rate=0.3), Arm(1, weight_decay=2.0), Arm(0, init=0.5))


def optimizer(kind, **changes):
    return kind(**{"lr": 1e-2, "weight_decay": 0.1, "schedule": Schedule(warmup=2, shape="cosine")} | changes)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_arms_are_each_what_they_are_alone(kind):
    grid = Grid(MODEL, DATA.build(), optimizer(kind), Train(steps=4), ARMS)
    *_, (done, state, losses) = grid.train()
    params, losses = state["params"], np.asarray(losses)
    assert done == 4 and losses.shape == (5,) and len(set(losses.tolist())) == 5
    alone = {0: optimizer(kind), 2: optimizer(kind, lr=3e-3), 3: optimizer(kind, weight_decay=2.0)}
    for number, mine in alone.items():
        run = SmallRun(MODEL, DATA.build(), mine, 4)
        *_, (_, expected, loss) = run.train(ARMS[number].seed, 4)
        assert abs(losses[number] - loss) < 1e-5
        for name, value in grid.of(params, number).items():
            np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)
        best, nats = grid.answers(grid.of(params, number))(DATA.build().batch(0, 0), 2)
        again, _ = run.answers(expected)(DATA.build().batch(0, 0), 2)
        assert best.shape == nats.shape == (4, 2) and (np.asarray(best) == np.asarray(again)).all()


def test_arms_begin_as_they_say():
    grid = Grid(MODEL, DATA.build(), optimizer(AdamW), Train(steps=4), ARMS)
    params = grid.start()["params"]
    alone, structure = flatten(MODEL.build(rngs=nnx.Rngs(0)))
    for name, value in params.items():
        np.testing.assert_array_equal(value[0], alone[name])
        np.testing.assert_array_equal(value[4], alone[name] * (0.5 if structure.specs[name].fan_in else 1.0))
    batch = grid.batch(3)
    np.testing.assert_array_equal(batch.ids_BT[0], batch.ids_BT[2])
    np.testing.assert_array_equal(batch.ids_BT[1], DATA.build().batch(1, 3).ids_BT)
    with pytest.raises(ValueError, match="at least one Arm"):
        Grid(MODEL, DATA.build(), optimizer(AdamW), Train(steps=4), ())


def test_one_arm_is_what_it_is_among_others():
    """Of a layer whose products with an axis of one arm ended the process."""
    model = LM(W=32, D=16, stages=(Stage((GLA(H=2, K=4, V=8, chunk=8),)),), tied=True)
    losses = {}
    for arms in (ARMS[:1], ARMS[:2]):
        grid = Grid(model, DATA.build(), optimizer(AdamW), Train(steps=2), arms)
        *_, (_, _, loss_A) = grid.train()
        losses[len(arms)] = np.asarray(loss_A)
    assert losses[1].shape == (1,)
    np.testing.assert_allclose(losses[1], losses[2][:1], atol=1e-5)


@pytest.mark.slow
def test_arms_are_spread_over_devices():
    """Eight arms on eight fake devices: the same losses, an arm a device, and no collective in the program."""
    arms = [Arm(seed) for seed in range(8)]
    grid = Grid(MODEL, DATA.build(), optimizer(AdamW), Train(steps=2), arms)
    state = grid.start()
    assert len(jax.tree.leaves(state)[0].sharding.device_set) == len(jax.devices()) == 8
    text = grid._step.lower(state, jax.device_put(grid.batch(0), grid._home), grid._numbers).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    *_, (_, _, losses) = grid.train()
    few = Grid(MODEL, DATA.build(), optimizer(AdamW), Train(steps=2), arms[:3])
    *_, (_, _, some) = few.train()
    np.testing.assert_allclose(losses[:3], some, atol=1e-5)

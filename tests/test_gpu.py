"""On a GPU (`make test-gpu`): its schedules and kernels against the definition, and training against the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from reading import cast, copy, grain, pad, places, same, same_tree, stack, stream, tokens
from test_laws import name
from test_recurrence import KINDS, documents, inputs, run, worst

import layers
from configs import quickstart
from layers.attention import number
from layers.layer import LayerConfig, Tokens
from layers.ops.attention import attention
from models.parameters import flatten
from training.optimizer import build_optimizer
from training.step import DeviceBatch, init_state, train_step

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def a_gpu() -> None:
    assert jax.default_backend() == "gpu", f"the backend is {jax.default_backend()}: make env ACCELERATOR=cuda"


@pytest.mark.parametrize(("family", "decay"), KINDS)
@pytest.mark.parametrize("implementation", ["auto", "scan"])
def test_recurrences_in_float32(family: str, decay: str, implementation: str) -> None:
    """Values, state and gradients within float32 rounding: no product falls to TF32."""
    x, pos = inputs(256, family, decay, dtype=np.float32), documents(256)
    assert worst(run(x, "naive", pos), run(x, implementation, pos)) < 2e-5


@pytest.mark.parametrize(("family", "decay"), KINDS)
def test_recurrences_with_bfloat16_operands(family: str, decay: str) -> None:
    """fla's bound for its kernels: an error of at most 0.005 to 0.02 of the norm, by array."""
    x = inputs(256, family, decay, dtype=np.float32)
    exact = run(x, "naive")
    rounded = {name: a.astype(jnp.bfloat16) if a is not None and name in "qkv" else a for name, a in x.items()}
    assert worst(exact, run(rounded, "auto")) < 0.02


@pytest.mark.parametrize("rows", ["plain", "documents", "padding"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("implementation", ["cudnn", "blocks", "auto"])
def test_attention_against_the_definition(implementation: str, window: int | None, rows: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.normal(size=(2, 512, h, 64)).astype(np.float32) for h in (4, 2, 2, 4))
    times: dict[str, Array] = {}
    if rows != "plain":
        gaps = ((90, 120), (500, 512)) if rows == "padding" else ()
        pos_BT = np.stack([pad(places(512, 100, 101, 300), *gaps), places(512, 400)])
        time_BT, since_BT = number(jnp.asarray(pos_BT), 0, 0)
        times = {"query_time": time_BT, "key_time": time_BT, "since": since_BT}

    def graded(dtype: jnp.dtype, name: str) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            y = attention(q, k, v, window=window, implementation=name, ordered=True, **times)
            return jnp.sum(y.astype(jnp.float32) * dy), y

        arguments = [jnp.asarray(a, dtype) for a in (q, k, v)]
        grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)
        return [y, *grads]

    with jax.default_matmul_precision("highest"):
        exact = graded(jnp.float32, "naive")
    assert worst(exact, graded(jnp.bfloat16, implementation)) < 0.02


EXAMPLES = [config for cls in layers.discover() for config in cls.examples()]


def slopes(config: LayerConfig, wide: type, dtype: type, device: jax.Device) -> tuple[Array, tuple[Array, ...]]:
    """y where it counts, and the slopes of its sum with random weights; documents, and padding, within the rows."""
    n = 2 * (grain(config) + 3)
    said = tokens(np.stack([pad(places(n, n // 2 + 2), (7, 9), (n - 2, n)), places(n, 3, n // 2)]))
    live = (said.pos_BT >= 0)[..., None]
    layer, x_BTD, dy_BTD = cast(copy(stack(config)), wide), stream(n).astype(dtype), stream(n, 1).astype(dtype)

    @jax.jit
    def read(layer, x_BTD, dy_BTD, said):
        y_BTD, back = jax.vjp(lambda layer, x: layer(x, said).y_BTD, layer, x_BTD)
        return jnp.where(live, y_BTD, 0), back(jnp.where(live, dy_BTD, 0).astype(y_BTD.dtype))

    return jax.device_get(read(*jax.device_put((layer, x_BTD, dy_BTD, said), device)))


@pytest.mark.parametrize("config", EXAMPLES, ids=name)
def test_a_layer_as_on_the_cpu(config: LayerConfig) -> None:
    """In float64 y and all slopes are those of the CPU, whose schedules the laws judge; in bfloat16 they are finite."""
    gpu = jax.devices("gpu")[0]
    with jax.enable_x64(True):
        got, want = (slopes(config, np.float64, np.float64, d) for d in (gpu, jax.devices("cpu")[0]))
    same(got[0], want[0], "y")
    same_tree(got[1], want[1], "slopes")
    rounded = slopes(config, np.float32, jnp.bfloat16, gpu)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(rounded) if a.dtype != np.int32)


def test_training_as_on_the_cpu() -> None:
    """Three steps of `quickstart`: the same losses, to float32's rounding through a few layers."""
    experiment = quickstart.config
    params, structure = flatten(experiment.model.build(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, experiment.model.W, (3, 4, 128), np.int32)
    place = np.broadcast_to(np.arange(128, dtype=np.int32), (4, 128))
    losses = []
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            optimizer = build_optimizer(experiment.optimizer, 100, experiment.train.clip, structure.specs)
            step = jax.jit(train_step(experiment, structure, optimizer, np.ones(experiment.model.W), None))
            state = init_state(experiment, jax.device_put(params, device), optimizer)
            said = []
            for batch in ids:
                state, metrics = step(state, DeviceBatch(*(jax.device_put((batch, place, batch), device))))
                said.append(float(metrics["loss"]))
            losses.append(said)
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_decoding_step_keeps_the_state_on_the_gpu() -> None:
    experiment = quickstart.config
    model = experiment.model.build(rngs=nnx.Rngs(0))
    tokens = Tokens(jnp.zeros((1, 8), jnp.int32), jnp.arange(8, dtype=jnp.int32)[None])
    out = jax.jit(lambda model, tokens: model(tokens, model.init_state(1, 16)))(model, tokens)
    assert jnp.isfinite(out.y_BTD).all()
    assert {d.platform for leaf in jax.tree.leaves(out.state) for d in leaf.devices()} == {"gpu"}

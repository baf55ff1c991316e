"""Layers of test-time memory: what their configs say, what they warn of, and breaking them."""

import warnings

import jax
import jax.numpy as jnp
import laws
import pytest
from flax import nnx
from memories import close

from layers.layer import Tokens
from layers.miras import Moneta
from layers.ops import test_time
from layers.test_time import TestTimeMemory, Unstable
from layers.titans import Titans

TestTimeMemory.__test__ = False  # it is no test


def test_a_key_that_repeats_stays_bounded():
    """8,192 times the same token through the layer as it comes; and beyond the stable range there is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = Titans(H=2).build(32, rngs=nnx.Rngs(0))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 1, 32)), (1, 8192, 32))
    tokens = Tokens(jnp.zeros((1, 8192), jnp.int32), jnp.arange(8192, dtype=jnp.int32)[None])
    y = jax.jit(lambda layer, x: layer(x, tokens).y_BTD)(layer, x)
    assert jnp.isfinite(y).all() and jnp.abs(y).max() < 30
    with pytest.warns(Unstable, match="lr_max / \\(1 - momentum_max\\) is 16"):
        Titans(lr_max=0.1)
    with pytest.warns(Unstable, match="power - 1\\) / \\(1 - momentum_max\\) is 9.6"):
        Moneta(lr_max=0.1)  # |.|^3 is six times as steep as half a square at an error of 1
    with pytest.warns(Unstable, match="0.125 is safe"):
        Titans(lr_max=1.0, momentum=False)


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "head", "loss": "huber_coord"},
        {"memory": "swiglu", "norm": False, "gate": False, "loss": "huber_mix"},
        {"depth": 1, "norm": False, "loss": "dot", "persistent": 2},
        {"loss": "lp", "power": 2.5, "retention": "lq_printed", "momentum": False, "keep": False},
        {"retention": "lq_mirror", "power_q": 3.0, "gates": "output", "rank": 2},
        {"retention": "kl", "step": "orthogonal", "conv": 0},
        {"retention": "elastic", "scale": 0.1, "depth": 3},
        {"update": "chunk", "keep": False, "memory": "swiglu", "step": "orthogonal", "renorm": True},
        {"update": "chunk", "keep": False, "momentum": False, "gates": "head"},
        {"exact": True, "depth": 1, "norm": False, "grad_at": "decayed", "persistent": 2},
        {"exact": True, "depth": 1, "norm": False, "loss": "dot", "gates": "head", "read": "pre"},
    ],
    ids=str,
)
def test_every_word_of_a_config(float64, options):
    """Each is built and read, the chunks as the definition."""
    x = jax.random.normal(jax.random.key(1), (1, 11, 16), jnp.float64)
    tokens = Tokens(jnp.zeros((1, 11), jnp.int32), jnp.arange(11, dtype=jnp.int32)[None])

    def answer(**words):
        layer = TestTimeMemory(H=2, F=6, chunk=4, **words).build(16, rngs=nnx.Rngs(0))
        return jax.jit(lambda layer, x: layer(x, tokens).y_BTD)(layer, x)

    y = answer(**options, implementation="chunked")
    close(y, answer(**options, implementation="naive"))
    assert jnp.isfinite(y).all() and jnp.abs(y).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l1"}, "loss is 'l1': it must be one of l2, dot"),
        ({"momentum_max": 1.0}, "momentum_max"),
        ({"lr_max": 0.0}, "lr_max"),
        ({"error_max": 0.0}, "error_max"),
        ({"persistent": -1}, "persistent"),
        ({"chunk": 0}, "chunk"),
        ({"exact": True}, "exact needs depth = 1, not 2"),
        ({"exact": True, "depth": 1, "norm": False, "loss": "lp"}, "exact needs loss 'l2' or 'dot'"),
        ({"update": "chunk"}, "update = 'chunk' needs keep = False"),
        ({"renorm": True}, "renorm is True, which needs update"),
        ({"grad_at": "decayed"}, "grad_at is 'decayed', which needs exact"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ValueError, match=f"TestTimeMemory.{message}|TestTimeMemory.*{message}"):
        TestTimeMemory(**change)


@pytest.mark.parametrize(
    ("law", "F", "broken"),
    [
        ("a_document_forgets", 10, lambda turn, state, starts_B, boundary_B: turn(state, starts_B & False, boundary_B)),
        ("any_cut_of_time", 11, lambda turn, state, starts_B, boundary_B: turn(state, starts_B, boundary_B & False)),
    ],
    ids=["starts are passed over", "the anchor stays behind"],
)
def test_a_broken_memory_breaks_a_law(monkeypatch, law, F, broken):
    """An F of its own each: what is compiled for a layer is shared by whoever has its config."""
    turn = test_time._turn

    def turned(rule, state, begin, starts_B, boundary_B):
        return broken(lambda *a: turn(rule, a[0], begin, *a[1:]), state, starts_B, boundary_B)

    monkeypatch.setattr(test_time, "_turn", turned)
    with pytest.raises(AssertionError):
        laws.LAWS[law](Titans(H=2, K=8, F=F, chunk=4))

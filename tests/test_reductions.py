"""Test-time memories that must be something known, and what they cost; in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memories import Case, H, K, close, documents

from layers.ops import fast_weights as fw
from layers.ops.linear import linear_recurrence
from layers.ops.memory_forms import Rule, State, Token, dual
from layers.ops.test_time import Gate, test_time_memory

test_time_memory.__test__ = False  # it is no test


def test_moneta_of_two_and_two_is_the_delta_rule_with_twice_the_steps(float64):
    """|.|_2^2 is twice the half square, and the 2-norm holds nothing: both maps are the identity."""
    case = Case(12, "linear", "l2", chunk=4, momentum=False)
    # Values so large that hardly a residual is in reach of the smoothing of |x| and of its sign near 0.
    a, pos = case.arrays | {"v": 1e4 * case.arrays["v"]}, documents(12)
    twice = {"w0": a["gates"]["w0"]._replace(lr=2 * a["gates"]["w0"].lr)}
    want = case.call(a | {"gates": twice}, pos)[0]
    for retention in (fw.lq_printed, fw.lq_mirror):
        rule = case.rule._replace(slope=functools.partial(fw.lp, 2.0), retention=functools.partial(retention, 2.0))
        case.rule, kept = rule, case.rule
        close(case.call(a, pos)[0], want, 1e-5)
        case.rule = kept


def test_memora_s_logits_are_its_softmax_of_logs(float64):
    """W_t = softmax(keep log W_{t-1} - lr ∇), as the paper writes it, however the weights are held."""
    T, scale = 6, 1.7
    case = Case(T, "linear", "l2", chunk=1, momentum=False, retention=functools.partial(fw.kl, scale))
    a, gate = case.arrays, case.arrays["gates"]["w0"]
    y, state = case.call(a, None)
    for b, h in ((0, 0), (1, 1)):
        W = scale * jax.nn.softmax(a["start"]["w0"][h], 0)
        for t in range(T):
            k, v, q = (a[n][b, t, h] for n in "kvq")
            slope = jnp.outer(k, k @ W - v)
            keep, lr = jnp.exp(gate.log_keep[b, t, h, 0]), gate.lr[b, t, h, 0]
            W = scale * jax.nn.softmax(keep * jnp.log(W / scale) - lr * slope, 0)
            close(y[b, t, h], q @ W)
        close(fw.kl(scale, state.weights["w0"][b, h]), W)


def test_one_average_of_a_linear_memory_is_linear_attention(float64):
    """TTT with b = T, W_0 = 0 and equal steps (Sun et al., theorem 1)."""
    T = 10
    case = Case(T, "linear", "l2", chunk=T, average=True)
    a = case.arrays
    zero = {"w0": jnp.zeros_like(a["start"]["w0"])}
    lr = jnp.full_like(a["gates"]["w0"].lr, 0.5)
    y, _ = case.call(a | {"start": zero, "gates": {"w0": Gate(lr)}, "row": jnp.ones((H, T))}, None)
    close(y, linear_recurrence(a["q"], a["k"], a["v"] / 2)[0])


def test_exact_chunks_in_float32():
    """Single precision: 1e-5, of values and gradients, at momentum 0.9 and steps of up to 1."""
    T, rng = 256, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, 2, 16)), jnp.float32) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    uniform = lambda low, high: jnp.asarray(rng.uniform(low, high, (1, T, 2, 1)), jnp.float32)  # noqa: E731
    gate = Gate(uniform(0, 1), jnp.log(uniform(0.9, 1)), jnp.log(uniform(0.2, 0.9)))
    start = {"w0": jnp.asarray(rng.normal(size=(2, 16, 16)), jnp.float32)}
    rule = Rule(fw.network("mlp", 1), fw.l2, chunk=64, exact="l2")

    def graded(implementation):
        def loss(args):
            q, k, v, gate = args
            y, _ = test_time_memory(rule, q, k, v, {"w0": gate}, (start, None), implementation=implementation)
            return jnp.mean(jnp.square(y)), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v, gate))

    close(graded("chunked"), graded("naive"), 1e-5)


@pytest.mark.parametrize("C", [16, 64])
def test_a_chunk_costs_what_the_readme_says(C):
    """22 d h + 4 C (d + h) FLOPs a token and head: two matrices, momentum; XLA's own count, within a tenth."""
    d, h = 128, 512
    rule = Rule(fw.network("mlp", 2), fw.l2, chunk=C)
    sizes = fw.sizes("mlp", d, d, h)
    W = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    x = jax.ShapeDtypeStruct((C, d), jnp.float32)
    one = jax.ShapeDtypeStruct((C, 1), jnp.float32)
    gates = {name: Gate(one, one, one, one) for name in sizes}
    outer = {name: jax.ShapeDtypeStruct((d,), jnp.float32) for name in ("scale", "shift")}
    run = jax.jit(functools.partial(dual, rule)).lower(State(W, W, W), Token(x, x, x, gates, None), None, outer)
    count = run.compile().cost_analysis()["flops"] / C
    assert 0.95 < count / (22 * d * h + 4 * C * (d + h)) < 1.1
    assert K < d  # a size of its own: the small one is all overhead

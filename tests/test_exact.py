"""Memories of one matrix read in chunks exactly: against the definition and the house's recurrences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memories import B, Case, H, K, close, documents

from layers.ops.recurrence import recurrence
from layers.ops.test_time import Gate, test_time_memory

test_time_memory.__test__ = False  # it is no test


def case_of(T: int, **options) -> Case:
    case = Case(T, "linear", options["exact"], **options)
    applied = jnp.asarray(np.random.default_rng(5).uniform(0.3, 1, (B, T, H, 1)))
    gates = case.arrays["gates"]
    case.arrays["gates"] = {"w0": gates["w0"]._replace(apply=applied)}
    return case


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 4, "exact": "l2"},
        {"chunk": 16, "exact": "l2", "decayed": True, "read": "pre"},
        {"chunk": 1, "exact": "l2", "keep": False},
        {"chunk": 64, "exact": "l2", "momentum": False},
        {"chunk": 5, "exact": "dot"},
    ],
    ids=str,
)
def test_chunks_are_the_definition(float64, options):
    """Values, state and every gradient, over documents that start anywhere, with momentum, an apply gate, p = a k."""
    case, pos = case_of(23, **options), documents(23)
    close(case.graded(pos, implementation="chunked"), case.graded(pos, implementation="naive"))


def test_a_chunk_size_changes_nothing(float64):
    """Cuts and chunks of any size are the gradient at each token's own weights: what chunks of 1 are to any memory."""
    case = case_of(23, chunk=4, exact="l2")
    start = case.call(case.arrays, documents(23)[:, :9], cut=slice(0, 9))[1]
    pos = documents(23)
    want = None
    for chunk, exact in ((1, None), (3, "l2"), (8, "l2")):
        case.rule = case.rule._replace(chunk=chunk, exact=exact)
        state = start._replace(anchor=None)
        y, state = case.call(case.arrays, pos, state, cut=slice(9, 23))
        got = [jnp.where((pos[:, 9:] >= 0)[..., None, None], y, 0), state]
        close(got, want := want or got)


def test_extreme_gates(float64):
    """Nothing kept, no momentum, a whole step: exact zeros in the products of gates, and finite slopes."""
    case = case_of(40, chunk=16, exact="l2")
    gate = case.arrays["gates"]["w0"]
    for log in (-60.0, -700.0):
        shut = {"w0": gate._replace(log_keep=jnp.full_like(gate.lr, log), log_momentum=jnp.full_like(gate.lr, log))}
        case.arrays["gates"] = shut
        out, grads = case.graded(None, implementation="chunked")
        close(out, case.graded(None, implementation="naive")[0])
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_without_momentum_it_is_the_gated_delta_rule(float64):
    """Decay first: the house's gated delta rule. Decay last: the same of β' = lr / keep, v' = keep v."""
    T, pos = 20, documents(20)
    live = (np.asarray(pos) >= 0)[..., None, None]
    for decayed in (True, False):
        case = Case(T, "linear", "l2", chunk=8, momentum=False, exact="l2", decayed=decayed)
        a, gate = case.arrays, case.arrays["gates"]["w0"]
        keep = 1.0 if decayed else jnp.exp(gate.log_keep)
        beta, v = gate.lr / keep, keep * a["v"]
        zero = a | {"start": jax.tree.map(jnp.zeros_like, a["start"])}
        y, state = case.call(zero, pos, implementation="chunked")
        want, memory = recurrence(
            *(a["q"], a["k"], beta * v, beta * a["k"], gate.log_keep[..., 0]),
            state=jnp.zeros((B, H, K, K)),
            pos=pos,
        )
        close([jnp.where(live, y, 0), state.weights["w0"]], [jnp.where(live, want, 0), memory])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ({}, {"implementation": "dual"}, "'dual': choose naive, chunked or auto"),
        ({"whole": 8}, {}, "neither exact"),
        ({"retention": jnp.tanh}, {}, "one matrix"),
    ],
)
def test_bad_calls(rule, options, message):
    case = case_of(4, chunk=4, exact="l2")
    gates = {"w0": Gate(case.arrays["gates"]["w0"].lr)}
    with pytest.raises(ValueError, match=message):
        test_time_memory(
            case.rule._replace(**rule),
            *(case.arrays[n] for n in "qkv"),
            gates,
            (case.arrays["start"], None),
            **options,
        )

"""One step for a whole chunk (LaCT): chunks against the definition, the definition against its words, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memories import Case, close, documents

from layers.ops import fast_weights as fw
from layers.ops.memory_forms import pull


@pytest.mark.parametrize(
    "options",
    [
        {"whole": 8, "chunk": 4, "renorm": True, "step": fw.newton_schulz},
        {"whole": 6, "chunk": 3, "momentum": False, "network": "mlp", "slope": "l2"},
    ],
    ids=["swiglu, orthogonal, renormalised", "mlp, plain"],
)
def test_chunks_are_the_definition(float64, options):
    """Documents that start anywhere, padding, a row that goes on in mid-chunk; values, state and gradients."""
    case, pos = Case(23, **{"network": "swiglu", "slope": "dot", "keep": False} | options), documents(23)
    close(case.graded(pos, remat=True), case.graded(pos, implementation="naive"), 1e-8)


def test_two_chunks_by_hand(float64):
    """Tokens 0-7 read the initial weights; the step is taken once, of their summed gradients, before token 8."""
    case = Case(16, "swiglu", "dot", keep=False, whole=8, chunk=4, renorm=True, step=fw.newton_schulz)
    a = case.arrays
    y, state = case.call(a, None)
    for b, h in ((0, 1), (1, 0)):
        W = {n: w[h] for n, w in a["start"].items()}
        outer = {}
        first = case.rule.memory(lambda n, z, W=W: z @ W[n], a["q"][b, :8, h], outer)
        np.testing.assert_allclose(y[b, :8, h], first, rtol=1e-10)
        total = {n: jnp.zeros_like(w) for n, w in W.items()}
        for t in range(8):
            one = slice(t, t + 1)
            slopes = pull(case.rule, W, a["k"][b, one, h], a["v"][b, one, h], None, outer)
            total = {n: total[n] - a["gates"][n].lr[b, t, h].item() * slopes[n] for n in W}
        new = {n: W[n] + fw.newton_schulz(total[n]) for n in W}
        new = {n: w * (jnp.linalg.norm(W[n], axis=0) / jnp.linalg.norm(w, axis=0))[None] for n, w in new.items()}
        second = case.rule.memory(lambda n, z, new=new: z @ new[n], a["q"][b, 8:, h], outer)
        np.testing.assert_allclose(y[b, 8:, h], second, rtol=1e-8)
        close({n: w[b, h] for n, w in state.weights.items()}, new)


def test_lengths_are_kept(float64):
    case = Case(40, "swiglu", "dot", keep=False, whole=5, chunk=5, renorm=True)
    _, state = case.call(case.arrays, None)
    for name, w in state.weights.items():
        assert jnp.abs(w - case.arrays["start"][name][None]).max() > 1e-3
        close(
            jnp.linalg.norm(w, axis=-2),
            jnp.broadcast_to(jnp.linalg.norm(case.arrays["start"][name], axis=-2)[None], w.shape[:2] + w.shape[3:]),
        )


def test_a_rule_that_cannot_be(float64):
    case = Case(4, "linear", "l2", whole=4, chunk=4, exact="l2")
    with pytest.raises(ValueError, match="one step for a whole chunk"):
        case.call(case.arrays, None)


def test_momentum_is_the_mean_of_its_gates(float64):
    """Weights after two steps: the second holds the mean gate of its chunk times the first."""
    case = Case(9, "linear", "dot", keep=False, whole=4, chunk=4)
    a = case.arrays
    _, state = case.call(a, None)
    gate = a["gates"]["w0"]
    steps = [
        jnp.einsum("bthk,bthv->bhkv", a["k"][:, s], gate.lr[:, s] * a["v"][:, s]) for s in (slice(0, 4), slice(4, 8))
    ]
    mean = jnp.mean(jnp.exp(gate.log_momentum[:, 4:8]), 1)[..., None]
    second = mean * steps[0] + steps[1]
    close([state.momentum["w0"], state.weights["w0"]], [second, a["start"]["w0"][None] + steps[0] + second])
    assert jax.tree.leaves(state.pending)[0].shape == steps[0].shape

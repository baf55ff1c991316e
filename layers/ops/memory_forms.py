"""A chunk of test-time memory, of one head: the forms that layers.ops.test_time takes it in, and what they speak of.

"dual" never forms a token's weights: a gradient is an outer product of what a matrix read and the slope at what it
answered, so that C tokens cost a few products of C by C (TTT, arXiv 2407.04620, appendix A, generalised to any memory
of matrix products, momentum and decay). "materialised" holds the weights of all tokens of a chunk. "exact" solves for
the steps of a memory of one matrix. Each is a function (rule, state, tokens, row, outer) -> (state, y [C, V]).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.chunk_tables import Table, averaging, fade, fading, same
from layers.ops.fast_weights import Lin
from layers.ops.precision import HIGHEST
from layers.ops.triangular import unit_lower_inverse

Weights = dict[str, Array]  # by name of the matrix: [..., inputs, outputs]; applied from the right


class Rule(NamedTuple):
    """What kind of memory: four pure functions on one head, and the grid.

    memory(lin, x [C, K], outer) -> [C, V], with matrices used once each, from the right and without bias; `outer` are
    parameters that no token changes. slope(y, v, threshold) -> [C, V], the gradient of the bias at the answer.
    retention: A -> W, by matrix; None for the identity. step: what is made of S before it is applied; None as it is.
    """

    memory: Callable[[Lin, Array, Any], Array]
    slope: Callable[[Array, Array, Array | None], Array]
    retention: Callable[[Array], Array] | None = None
    step: Callable[[Array], Array] | None = None
    chunk: int = 16
    read: Literal["post", "pre"] = "post"  # y_t sees A_t, or A_{t-1}
    average: bool = False  # TTT: A_t = anchor + row_t · sum of U
    # Each gradient is taken at A_{t-1}, whatever the chunk, and the matrix "w0" is the whole memory. Says what `slope`
    # is: y - v ("l2") or -v ("dot"). Gates are one a head.
    exact: Literal["l2", "dot"] | None = None
    decayed: bool = False  # with `exact`: the gradient is taken at keep_t A_{t-1} instead
    # One step for this many tokens, taken when the next ones begin: they read the weights from before. `chunk` is then
    # how the work is cut.
    whole: int | None = None
    renorm: bool = False  # with `whole`: each unit's weights keep the length with which the document began


class State(NamedTuple):
    """[B, H, inputs, outputs] each. anchor is None where each gradient is taken at A; momentum where there is none.

    pending, tally: of a rule that steps for many tokens at once, the sum of their U and [B, H, 1, 1] of their momentum.
    """

    weights: Weights
    momentum: Weights | None
    anchor: Weights | None
    pending: Weights | None = None
    tally: Array | None = None


class Token(NamedTuple):
    """What is read at a token; time is axis 1, or axis 0 of the C tokens of one head's chunk."""

    q: Array
    k: Array
    v: Array
    gates: dict[str, Any]  # Gate as it comes, Open inside
    threshold: Array | None


def retained(rule: Rule, A: Weights) -> Weights:
    return A if rule.retention is None else {name: rule.retention(a) for name, a in A.items()}


def plain(W: Weights) -> Lin:
    return lambda name, x: jnp.matmul(x, W[name], precision=HIGHEST)


def pull(rule: Rule, W: Weights, k: Array, v: Array, threshold: Array | None, outer: Any) -> Weights:
    """The gradient of the bias in the weights, for the tokens given."""
    y, back = jax.vjp(lambda W: rule.memory(plain(W), k, outer), W)
    return back(rule.slope(y, v, threshold))[0]


def taps(rule: Rule, W: Weights, x: Token, outer: Any) -> tuple[Weights, Weights]:
    """What each matrix read [C, inputs], and -lr times the slope at what it answered [C, outputs], at weights W.

    The step of token i is the outer product of its rows.
    """
    C = x.k.shape[0]

    def tapped(bump: Weights) -> tuple[Array, Weights]:
        """The memory, with room to push what each matrix answers."""
        seen: Weights = {}

        def lin(name: str, z: Array) -> Array:
            seen[name] = z
            return jnp.matmul(z, W[name], precision=HIGHEST) + bump[name]

        return rule.memory(lin, x.k, outer), seen

    still = {name: jnp.zeros((C, a.shape[-1]), a.dtype) for name, a in W.items()}
    answer, back, seen = jax.vjp(tapped, still, has_aux=True)
    pushed = back(rule.slope(answer, x.v, x.threshold))[0]
    return seen, {name: -x.gates[name].lr * slope for name, slope in pushed.items()}


def _still(rule: Rule, x: Token, new: Weights, old: Weights) -> Weights:
    """A chunk without tokens leaves A alone, which the table of an average does not say."""
    if not rule.average:
        return new
    return {name: jnp.where(jnp.any(x.gates[name].apply > 0), new[name], old[name]) for name in new}


def _tables(rule: Rule, x: Token, row: Array | None) -> dict[str, Table]:
    pre = rule.read == "pre"
    if row is not None:
        return {name: averaging(gate, row, pre) for name, gate in x.gates.items()}
    return {name: fading(gate, pre) for name, gate in x.gates.items()}


def dual(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """A chunk of one head; the weights of its tokens are never formed."""
    A, S = state.weights, state.momentum
    anchor = A if state.anchor is None else state.anchor
    base = anchor if rule.average else A
    tables = _tables(rule, x, row)
    seen, pushed = taps(rule, anchor, x, outer)

    def lin(name: str, z: Array) -> Array:
        t = tables[name]
        y = t.own * jnp.matmul(z, base[name], precision=HIGHEST)
        if t.past is not None and S is not None:
            y += t.past * jnp.matmul(z, S[name], precision=HIGHEST)
        match = jnp.matmul(z, seen[name].T, precision=HIGHEST)
        if t.mix.shape[-1] == 1:
            return y + jnp.matmul(t.mix[..., 0] * match, pushed[name], precision=HIGHEST)
        return y + jnp.einsum("tio,ti,io->to", t.mix, match, pushed[name], precision=HIGHEST)

    y = rule.memory(lin, x.q, outer)
    new_A, new_S = {}, {}
    for name, t in tables.items():
        own, past, mix = t.end
        new_A[name] = own * base[name] + jnp.matmul(seen[name].T, mix * pushed[name], precision=HIGHEST)
        if S is not None:
            new_S[name] = jnp.matmul(seen[name].T, pushed[name], precision=HIGHEST)
            if past is not None:
                new_A[name] += past * S[name]
            if t.momentum is not None:
                held, holds = t.momentum
                new_S[name] = held * S[name] + jnp.matmul(seen[name].T, holds * pushed[name], precision=HIGHEST)
    return State(_still(rule, x, new_A, A), None if S is None else new_S, state.anchor), y


def exact(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """A chunk of one head of one matrix: U_i = k_i R_i^T, and each R is linear in the earlier ones.

    (Momentum DeltaNet, arXiv 2605.05838, has the same idea for its own recurrence.)
    """
    A, S, gate = state.weights["w0"], None if state.momentum is None else state.momentum["w0"], x.gates["w0"]
    table, before = fading(gate, rule.read == "pre"), fading(gate, True)

    def recall(t: Table, z: Array) -> Array:
        """What the A_0 and S_0 in the weights of each token answer."""
        y = t.own * jnp.matmul(z, A, precision=HIGHEST)
        return y if t.past is None or S is None else y + t.past * jnp.matmul(z, S, precision=HIGHEST)

    if rule.exact == "l2":
        erase = jnp.exp(gate.log_keep) * x.k if rule.decayed and gate.log_keep is not None else x.k
        lower = gate.lr * before.mix[..., 0] * jnp.matmul(erase, x.k.T, precision=HIGHEST)
        R = jnp.matmul(unit_lower_inverse(lower), gate.lr * (x.v - recall(before, erase)), precision=HIGHEST)
    else:
        R = gate.lr * x.v
    match = table.mix[..., 0] * jnp.matmul(x.q, x.k.T, precision=HIGHEST)
    y = recall(table, x.q) + jnp.matmul(match, R, precision=HIGHEST)
    own, past, mix = table.end
    new_A, new_S = own * A + jnp.matmul(x.k.T, mix * R, precision=HIGHEST), None
    if S is not None:
        if past is not None:
            new_A += past * S
        held, holds = table.momentum if table.momentum is not None else (jnp.ones_like(own), jnp.ones_like(gate.lr))
        new_S = {"w0": held * S + jnp.matmul(x.k.T, holds * R, precision=HIGHEST)}
    return State({"w0": new_A}, new_S, state.anchor), y


def materialised(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """A chunk of one head, with the weights of all of its tokens."""
    A, S = state.weights, state.momentum
    anchor = A if state.anchor is None else state.anchor
    base = anchor if rule.average else A
    W = retained(rule, anchor)

    def one(x: Token) -> Weights:
        x = jax.tree.map(lambda a: a[None], x)
        return pull(rule, W, x.k, x.v, x.threshold, outer)

    slopes = jax.vmap(one)(x)
    tables = _tables(rule, x, row)
    new_A, new_S, seen = {}, {}, {}
    for name, t in tables.items():
        gate = x.gates[name]
        U = -gate.lr[:, None, :] * slopes[name]
        if rule.step is not None:
            if gate.log_momentum is not None and S is not None:
                held, holds = fade(gate.log_momentum)
                every = held[:, None] * S[name][None] + jnp.einsum("tio,iao->tao", *same(holds, U), precision=HIGHEST)
                new_S[name] = every[-1]
            else:
                every = U
            t = fading(gate._replace(log_momentum=None), rule.read == "pre")
            U = jax.vmap(rule.step)(every)
        elif S is not None and t.momentum is not None:
            held, holds = t.momentum
            new_S[name] = held * S[name] + jnp.einsum("io,iao->ao", *same(holds, U), precision=HIGHEST)
        own, past, mix = t.end
        seen[name] = t.own[:, None] * base[name][None] + jnp.einsum("tio,iao->tao", *same(t.mix, U), precision=HIGHEST)
        new_A[name] = own * base[name] + jnp.einsum("io,iao->ao", *same(mix, U), precision=HIGHEST)
        if past is not None and S is not None:
            new_A[name] += past * S[name]
        if t.past is not None and S is not None:
            seen[name] += t.past[:, None] * S[name][None]

    y = jax.vmap(lambda A, q: rule.memory(plain(retained(rule, A)), q[None], outer)[0])(seen, x.q)
    return State(_still(rule, x, new_A, A), None if S is None else new_S, state.anchor), y


def summed(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """Tokens of one head that all read the same weights, and whose steps are yet to be taken."""
    seen, pushed = taps(rule, state.weights, x, outer)
    y = rule.memory(plain(state.weights), x.q, outer)
    assert state.pending is not None and state.tally is not None
    pending = {n: p + jnp.matmul(seen[n].T, pushed[n], precision=HIGHEST) for n, p in state.pending.items()}
    return state._replace(pending=pending, tally=state.tally + count(x)), y


def form_of(rule: Rule) -> Callable[[Rule, State, Token, Array | None, Any], tuple[State, Array]]:
    """The form that serves a rule at the least cost."""
    if rule.exact is not None:
        return exact
    if rule.whole is not None:
        return summed
    return dual if rule.retention is None and rule.step is None else materialised


def count(x: Token) -> Array:
    """The sum of momentum gates over the tokens there are, [1, 1]."""
    gate = next(iter(x.gates.values()))
    if gate.log_momentum is None:
        return jnp.zeros((1, 1), x.q.dtype)
    return jnp.sum(jnp.where(gate.apply > 0, jnp.exp(gate.log_momentum), 0), 0, keepdims=True)

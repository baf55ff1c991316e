"""Test-time memory: a small network whose weights are the state, trained on (key, value) as the tokens pass.

For each token, with W = retention(A) the weights in use and "anchor" the A at which the token's chunk began:

    U_t = -lr_t · gradient of the attentional bias of memory(retention(anchor); k_t) against v_t
    S_t = momentum_t S_{t-1} + U_t
    A_t = keep_t A_{t-1} + apply_t S_t                   y_t = memory(retention(A_t); q_t)

(Titans, arXiv 2501.00663, equations 11-15; Miras, 2504.13173, for the bias and the retention; TTT, 2407.04620, where
instead A_t = anchor + row_t · (sum of the chunk's U).) A chunk is C tokens of a document, counted from its start: the
size belongs to the model. With C = 1 this is online gradient descent; with C > 1 all gradients of a chunk are taken at
its anchor, which is another function, and the one that can be computed in parallel.

A memory of one matrix needs no such bargain: what each step says of the next is linear, and a triangular system of C by
C tells all steps of C tokens at once ("exact"). There C is only how the work is cut up, and changes nothing.

And a memory may take one step for a whole chunk of thousands of tokens, when the next one begins (LaCT, 2505.23884;
`Rule.whole`): S = mean momentum · S + sum of U, A = A + step(S), each unit's weights brought back to their length.

"naive" is the definition, token by token. "chunked" reads a chunk at once, in whichever form of it serves the rule
(layers/ops/memory_forms.py).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.chunk_loop import SHORT, over_chunks
from layers.ops.chunk_tables import Open
from layers.ops.memory_forms import (
    Rule,
    State,
    Token,
    Weights,
    count,
    form_of,
    plain,
    pull,
    retained,
)
from layers.ops.place import sizes
from layers.ops.precision import HIGHEST, wide
from layers.ops.sequence import by_rows

Implementation = Literal["auto", "naive", "chunked"]


class Gate(NamedTuple):
    """Of one matrix, [B, T, H, 1], or [B, T, H, outputs] for a gate on each output channel. Logs are at most 0."""

    lr: Array
    log_keep: Array | None = None  # None: nothing is forgotten
    log_momentum: Array | None = None  # None: no momentum
    apply: Array | None = None  # [B, T, H, 1]; None: 1


def test_time_memory(
    rule: Rule,
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    gates: dict[str, Gate],
    start: tuple[Weights, Weights | None],
    outer: Any = (),
    *,
    threshold: Array | None = None,
    row: Array | None = None,
    state: State | None = None,
    pos: Array | None = None,
    implementation: Implementation = "auto",
    remat: bool = True,
    wanted: bool = True,
    chunks: int | None = None,
) -> tuple[Array, State | None]:
    """Returns (y_BTHV in the dtype of v, the state after the last token, in the dtypes in which it came).

    gates: for each matrix. start: weights and momentum (None: zeros) with which a document begins, [H, inputs, outputs]
    each; `outer`: leaves [H, ...]. threshold: [B, T, H, 1], for biases that have one. row: [H, C], for `average`.
    state: None for the start. pos: int [B, T] as in layers.layer.Tokens; None for a document from its start.
    remat: whether the backward pass recomputes the chunks, from states that were kept here and there (of many chunks
    about the square root of their number); or keeps all that it wants, which takes a known number of chunks. wanted:
    whether the state is; where it is not (None comes back) and none came, no anchor is carried. chunks: the most that
    a row holds, where that is known.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation {implementation!r}: choose naive, chunked or auto")
    if rule.exact is not None and (rule.retention, rule.step, rule.average, set(gates)) != (None, None, False, {"w0"}):
        raise ValueError("an exact rule has one matrix, w0, that fades by itself, and steps applied as they are")
    if len({gate.log_momentum is None for gate in gates.values()}) > 1:
        raise ValueError("either all matrices have momentum or none has")
    if rule.whole is not None and (rule.exact, rule.retention, rule.average) != (None, None, False):
        raise ValueError("a rule with one step for a whole chunk is neither exact, nor averages, nor has a retention")
    if rule.average != (row is not None):
        raise ValueError("`row` is for rules that average, and they need it")
    if state is not None and pos is None:
        raise ValueError("a state goes on somewhere in a document: say `pos`")
    if not remat and pos is not None and chunks is None:
        raise ValueError("without `remat` there is room for a known number of chunks: say `chunks`, or leave out `pos`")
    B, T, H, _ = q_BTHK.shape
    if sizes():  # rows and heads know nothing of each other: each device reads some, in order
        arguments = {
            "q_BTHK": ("BTH", q_BTHK), "k_BTHK": ("BTH", k_BTHK), "v_BTHV": ("BTH", v_BTHV), "gates": ("BTH", gates),
            "start": ("H", start), "outer": ("H", outer), "threshold": ("BTH", threshold), "row": ("H", row),
            "state": ("BH", state), "pos": ("BT", pos),
        }  # fmt: skip

        def read(**given: Any) -> tuple[Array, State | None]:
            return test_time_memory(
                rule, **given, implementation=implementation, remat=remat, wanted=wanted, chunks=chunks
            )

        return by_rows(read, (B, T, H), arguments, ("BTH", "BH"))
    dtype = wide(q_BTHK, v_BTHV)
    xs = Token(q_BTHK, k_BTHK, v_BTHV, gates, threshold)
    xs, start, outer, row = jax.tree.map(lambda x: x.astype(dtype), (xs, start, outer, row))
    if start[1] is None and any(gate.log_momentum is not None for gate in gates.values()):
        start = start[0], jax.tree.map(jnp.zeros_like, start[0])
    begin = first_state(rule, *start)
    given, loose = state, state is None and not wanted  # loose: every chunk begins with its anchor, so A is enough
    if state is None:
        state = rows(jnp.ones(B, bool), begin)
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    known = pos is None
    pos = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)) if pos is None else pos
    valid_BT11 = (pos >= 0)[:, :, None, None]
    xs = xs._replace(gates={name: _open(gate, valid_BT11) for name, gate in xs.gates.items()})

    if implementation == "naive" or (implementation == "auto" and T <= SHORT):
        y, state = _naive(rule, xs, begin, outer, row, state, pos)
    else:
        most = -(-T // rule.chunk) if known else chunks
        y, state = _chunked(rule, loose, remat, most, xs, begin, outer, row, state, pos)
    if given is not None:
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, given)
    return y.astype(v_BTHV.dtype), state if wanted else None


def first_state(rule: Rule, weights: Weights, momentum: Weights | None = None) -> State:
    """The state in which a document begins; momentum: None for rules without (an average has its own, zeros)."""
    zeros = jax.tree.map(jnp.zeros_like, weights)
    momentum = zeros if rule.average else momentum
    if rule.whole is not None:
        return State(weights, momentum, None, zeros, zeros[next(iter(zeros))][..., :1, :1])
    return State(weights, momentum, None if rule.chunk == 1 or rule.exact else weights)


def _open(gate: Gate, valid_BT11: Array) -> Open:
    apply = jnp.ones_like(gate.lr[..., :1]) if gate.apply is None else gate.apply
    gates = gate.lr, gate.log_keep, gate.log_momentum, apply
    return Open(*(None if x is None else jnp.where(valid_BT11, x, 0) for x in gates))  # type: ignore[arg-type]


EPS = 1e-12  # of squared lengths
LARGEST = 1e6  # of weights where a chunk begins, and of the loss's slope in what a chunk reads: the state, its tokens


@jax.custom_vjp
def bounded(state: Any) -> Any:
    """A tree of arrays; its cotangent, held within ±LARGEST.

    A learner driven past its stable range is chaotic: the slope in where it began grows with every chunk, until it is
    infinite. Bounded, it is merely large, which clipping can deal with. Below the bound nothing changes.
    """
    return state


@jax.custom_vjp
def held(state: Any) -> Any:
    """As `bounded`, and the arrays too are held within ±LARGEST: what has diverged so far would overflow in a chunk."""
    return _within(state)


def _within(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.clip(x, -LARGEST, LARGEST), tree)


bounded.defvjp(lambda state: (state, None), lambda _, cotangent: (_within(cotangent),))
held.defvjp(lambda state: (_within(state), None), lambda _, cotangent: (_within(cotangent),))


def _heads(function: Callable, batched: tuple[bool, ...]) -> Callable:
    """`function` of one head over B and H; arguments that are not batched have H only."""
    over_H = jax.vmap(function)
    return jax.vmap(over_H, in_axes=tuple(0 if b else None for b in batched))


def _where(mask_B: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(mask_B.reshape((-1,) + (1,) * (b.ndim - 1)), a, b), a, b)


def rows(mask_B: Array, begin: Any) -> Any:
    """Leaves [H, ...] -> [B, H, ...], zero in the other rows.

    A product, so that the slope is one too: XLA's threads on a CPU sum few rows of many numbers far more slowly.
    """
    return jax.tree.map(lambda a: jnp.tensordot(mask_B.astype(a.dtype), a, 0, precision=HIGHEST), begin)


def _turn(rule: Rule, state: State, begin: State, starts_B: Array, boundary_B: Array) -> State:
    """What happens before the first token of a chunk."""
    if state.anchor is None:
        begin = begin._replace(anchor=None)
    if rule.whole is not None:
        stepped = jax.lax.cond(
            jnp.any(boundary_B & ~starts_B), functools.partial(_step, rule, begin), lambda state: state, state
        )
        state = _where(boundary_B, stepped, state)
    fresh = lambda state: _where(starts_B, rows(starts_B, begin), state)  # noqa: E731
    # Most chunks begin no document; without the condition each sums over all rows' states, for the slope in `begin`.
    state = jax.lax.cond(jnp.any(starts_B), fresh, lambda state: state, state)
    if rule.average:
        state = state._replace(
            momentum=_where(boundary_B, jax.tree.map(jnp.zeros_like, state.momentum), state.momentum)
        )
    return state if state.anchor is None else state._replace(anchor=_where(boundary_B, state.weights, state.anchor))


def _step(rule: Rule, begin: State, state: State) -> State:
    """The one step for the whole chunk that is over."""
    S, tally, step = state.pending, state.tally, rule.step
    assert S is not None and tally is not None and rule.whole is not None
    if state.momentum is not None:
        S = {name: tally / rule.whole * state.momentum[name] + u for name, u in S.items()}
    A = {n: state.weights[n] + (s if step is None else jax.vmap(jax.vmap(step))(s)) for n, s in S.items()}
    if rule.renorm:
        A = {n: a * (_length(begin.weights[n])[None] / _length(a)) for n, a in A.items()}
    zeros = jax.tree.map(jnp.zeros_like, (state.pending, tally))
    return State(A, None if state.momentum is None else S, None, *zeros)


def _length(a: Array) -> Array:
    """Of the weights into each unit."""
    return jnp.sqrt(jnp.sum(jnp.square(a), -2, keepdims=True) + EPS)


def recall(rule: Rule, q_BTHK: Array, weights: Weights, outer: Any = ()) -> Array:
    """What a memory of `weights`, [B, H, inputs, outputs] each, answers, y_BTHV; nothing is learned."""

    def head(q: Array, A: Weights, outer: Any) -> Array:
        return rule.memory(plain(retained(rule, A)), q, outer)

    q_BHTK = q_BTHK.astype(next(iter(weights.values())).dtype).swapaxes(1, 2)
    return _heads(head, (True, True, False))(*bounded((q_BHTK, weights, outer))).swapaxes(1, 2)


def _naive(
    rule: Rule, xs: Token, begin: State, outer: Any, row: Array | None, state: State, pos: Array
) -> tuple[Array, State]:
    """The definition."""
    C = rule.chunk

    def token(state: State, x: Token, row_1: Array | None, outer: Any) -> tuple[State, Array]:
        one = jax.tree.map(lambda a: a[None], x)
        A, S = state.weights, state.momentum
        anchor = A if state.anchor is None else state.anchor
        if rule.decayed:
            anchor = {n: a if (log := one.gates[n].log_keep) is None else jnp.exp(log) * a for n, a in anchor.items()}
        slopes = pull(rule, retained(rule, anchor), one.k, one.v, one.threshold, outer)
        if rule.whole is not None and state.tally is not None:
            pending = {n: p - one.gates[n].lr * slopes[n] for n, p in (state.pending or {}).items()}
            y = rule.memory(plain(A), one.q, outer)[0]
            return state._replace(pending=pending, tally=state.tally + count(one)), y
        new_A, new_S = {}, {}
        for name, gate in one.gates.items():
            step = -gate.lr * slopes[name]
            if S is not None:
                held = S[name] if gate.log_momentum is None else jnp.exp(gate.log_momentum) * S[name]
                step = new_S[name] = held + step
            if rule.average:
                new_A[name] = jnp.where(gate.apply > 0, anchor[name] + row_1 * step, A[name])
                continue
            step = step if rule.step is None else rule.step(step)
            kept = A[name] if gate.log_keep is None else jnp.exp(gate.log_keep) * A[name]
            new_A[name] = kept + gate.apply * step
        seen = A if rule.read == "pre" else new_A
        y = rule.memory(plain(retained(rule, seen)), one.q, outer)[0]
        return State(new_A, None if S is None else new_S, state.anchor), y

    every = _heads(token, (True, True, False, False) if row is None else (True, True, True, False))

    def step(state: State, timed: tuple[Token, Array]) -> tuple[State, Array]:
        x, pos_B = timed
        state = _turn(rule, held(state), begin, pos_B == 0, (pos_B >= 0) & (pos_B % (rule.whole or C) == 0))
        row_BH = None if row is None else row.T[jnp.maximum(pos_B, 0) % C]
        return every(state, bounded(x), row_BH, bounded(outer))

    T = pos.shape[1]
    group = math.isqrt(T) if T > 64 else 1
    rest = -T % group
    xs = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2)), xs)
    pos = jnp.pad(pos, ((0, 0), (0, rest)), constant_values=-1)
    state, y = _scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (xs, pos)), group)
    return jnp.moveaxis(y, 0, 1)[:, :T], state


def _scan(body: Callable, state: State, xs: Any, group: int) -> tuple[State, Array]:
    """A scan of which the backward pass keeps the state of each group only, and recomputes the group from it."""
    if group == 1:
        return jax.lax.scan(body, state, xs)
    xs = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), xs)
    state, y = jax.lax.scan(jax.checkpoint(lambda s, x: jax.lax.scan(body, s, x), prevent_cse=False), state, xs)
    return state, y.reshape(-1, *y.shape[2:])


def _chunked(
    rule: Rule,
    loose: bool,
    remat: bool,
    most: int | None,
    xs: Token,
    begin: State,
    outer: Any,
    row: Array | None,
    state: State,
    pos: Array,
) -> tuple[Array, State]:
    every = _heads(functools.partial(form_of(rule), rule), (True, True, False, False))

    def body(shared: Any, state: State, x: Token, pos_BC: Array) -> tuple[State, Array]:
        begin, outer, row = shared
        starts_B = jnp.any(pos_BC == 0, 1)
        boundary_B = jnp.any((pos_BC >= 0) & (pos_BC % (rule.whole or rule.chunk) == 0), 1)
        state = _turn(rule, held(state), begin, starts_B, boundary_B)
        # Zeros where there is no token: there no gate is open.
        x = jax.tree.map(lambda a: a.swapaxes(1, 2), bounded(x))
        state, y_BHCV = every(state, x, row, bounded(outer))
        return state, y_BHCV.swapaxes(1, 2)

    if loose:
        state = state._replace(anchor=None)
    y, state = over_chunks(body, (begin, outer, row), state, xs, pos, rule.chunk, most=most, keep=not remat)
    if begin.anchor is not None and state.anchor is None:
        state = state._replace(anchor=state.weights)  # for the form; it is not wanted
    return y, state

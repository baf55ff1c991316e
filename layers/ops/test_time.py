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

"naive" is the definition, token by token. "dual" never forms a token's weights: a gradient is an outer product of what
a matrix read and the slope at what it answered, so that C tokens cost a few products of C by C (TTT, appendix A,
generalised to any memory of matrix products, momentum and decay). "materialised" holds the weights of all tokens of a
chunk: it serves what the dual form cannot, retentions that are not linear and steps that are made orthogonal.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.chunk_tables import Open, Table, averaging, fade, fading, same
from layers.ops.fast_weights import Lin
from layers.ops.grid import gather, grid, lay, needed
from layers.ops.precision import HIGHEST, wide
from layers.ops.triangular import unit_lower_inverse

Weights = dict[str, Array]  # by name of the matrix: [..., inputs, outputs]; applied from the right
Engine = Literal["auto", "naive", "dual", "materialised", "exact"]
Remat = Literal["none", "body", "both"]


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


class Gate(NamedTuple):
    """Of one matrix, [B, T, H, 1], or [B, T, H, outputs] for a gate on each output channel. Logs are at most 0."""

    lr: Array
    log_keep: Array | None = None  # None: nothing is forgotten
    log_momentum: Array | None = None  # None: no momentum
    apply: Array | None = None  # [B, T, H, 1]; None: 1


class State(NamedTuple):
    """[B, H, inputs, outputs] each. anchor is None where C is 1; momentum where the rule has none."""

    weights: Weights
    momentum: Weights | None
    anchor: Weights | None


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
    implementation: Engine = "auto",
    remat: Remat = "both",
    wanted: bool = True,
    chunks: int | None = None,
) -> tuple[Array, State | None]:
    """Returns (y_BTHV in the dtype of v, the state after the last token, float32 or float64).

    gates: for each matrix. start: weights and momentum (None: zeros) with which a document begins, [H, inputs, outputs]
    each; `outer`: leaves [H, ...]. threshold: [B, T, H, 1], for biases that have one. row: [H, C], for `average`.
    state: None for the start. pos: int [B, T] as in layers.layer.Tokens; None for a document from its start.
    remat: what the backward pass recomputes: nothing, each chunk, or groups of chunks as well (memory of about twice
    the square root of the number of chunks, instead of all). wanted: whether the state is; where it is not (None comes
    back) and none came, no anchor is carried. chunks: the most that a row holds, where that is known.
    """
    if implementation not in get_args(Engine):
        raise ValueError(f"implementation {implementation!r}: choose naive, dual, materialised, exact or auto")
    if implementation not in ("auto", "naive") and (implementation == "exact") != (rule.exact is not None):
        raise ValueError(f"implementation {implementation!r} does not serve a rule whose `exact` is {rule.exact}")
    if rule.exact is not None and (rule.retention, rule.step, rule.average, set(gates)) != (None, None, False, {"w0"}):
        raise ValueError("an exact rule has one matrix, w0, that fades by itself, and steps applied as they are")
    if implementation == "dual" and (rule.retention is not None or rule.step is not None):
        raise ValueError("the dual form serves linear retentions and steps only: choose materialised or auto")
    if len({gate.log_momentum is None for gate in gates.values()}) > 1:
        raise ValueError("either all matrices have momentum or none has")
    if rule.average != (row is not None):
        raise ValueError("`row` is for rules that average, and they need it")
    if state is not None and pos is None:
        raise ValueError("a state goes on somewhere in a document: say `pos`")
    B, T, H, _ = q_BTHK.shape
    dtype = wide(q_BTHK, v_BTHV)
    xs = Token(q_BTHK, k_BTHK, v_BTHV, gates, threshold)
    xs, start, outer, row = jax.tree.map(lambda x: x.astype(dtype), (xs, start, outer, row))
    begin = _begin(rule, start, gates)
    loose = state is None and not wanted  # every chunk begins with its anchor: A is enough
    if state is None:
        state = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (B, *x.shape)), begin)
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    known = pos is None
    pos = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)) if pos is None else pos
    valid_BT11 = (pos >= 0)[:, :, None, None]
    xs = xs._replace(gates={name: _open(gate, valid_BT11) for name, gate in xs.gates.items()})

    C = rule.chunk
    # Chunks, should every token start a document; and what is usual, or costs little whether there are so many or not.
    most, least = T + 1, max(2 * -(-T // C) + 8, 1024 // C)
    if implementation == "naive" or (implementation == "auto" and T <= SHORT):
        y, state = _naive(rule, xs, begin, outer, row, state, pos)
    else:
        materialised = implementation == "materialised" or rule.retention is not None or rule.step is not None
        piece = _exact if rule.exact else _materialised if materialised else _dual
        run = functools.partial(_chunked, rule, piece, loose, remat)
        if known:
            y, state = run(-(-T // C), xs, begin, outer, row, state, pos)
        elif most <= least or chunks is not None:
            y, state = run(chunks or most, xs, begin, outer, row, state, pos)
        else:
            y, state = jax.lax.cond(
                needed(pos, C) <= least,
                functools.partial(run, least),
                functools.partial(_naive, rule),
                *(xs, begin, outer, row, state, pos),
            )
    return y.astype(v_BTHV.dtype), state if wanted else None


class Token(NamedTuple):
    """What is read at a token; time is axis 1, or axis 0 of the C tokens of one head's chunk."""

    q: Array
    k: Array
    v: Array
    gates: dict[str, Any]  # Gate as it comes, Open inside
    threshold: Array | None


def _open(gate: Gate, valid_BT11: Array) -> Open:
    apply = jnp.ones_like(gate.lr[..., :1]) if gate.apply is None else gate.apply
    gates = gate.lr, gate.log_keep, gate.log_momentum, apply
    return Open(*(None if x is None else jnp.where(valid_BT11, x, 0) for x in gates))  # type: ignore[arg-type]


def _begin(rule: Rule, start: tuple[Weights, Weights | None], gates: dict[str, Gate]) -> State:
    """The state in which a document begins, without the axis B."""
    weights, momentum = start
    if momentum is None and (rule.average or any(gate.log_momentum is not None for gate in gates.values())):
        momentum = jax.tree.map(jnp.zeros_like, weights)
    return State(weights, momentum, None if rule.chunk == 1 or rule.exact else weights)


SHORT = 8  # up to this many tokens the definition is the faster form, and the faster to compile
LARGEST = 1e6  # of the loss's slope in what a chunk reads: the state, its tokens


@jax.custom_vjp
def bounded(state: Any) -> Any:
    """A tree of arrays; its cotangent, by matrix (the last two axes), scaled down where an entry is beyond LARGEST.

    A learner driven past its stable range is chaotic: the slope in where it began grows with every chunk, until it is
    infinite. Bounded, it is merely large, which clipping can deal with; and where it is infinite within one chunk, it
    says nothing, and counts as zero. Below the bound nothing changes.
    """
    return state


def _bound(_: None, cotangent: Any) -> tuple[Any]:
    def scaled(g: Array) -> Array:
        most = jnp.max(jnp.abs(g), tuple(range(max(g.ndim - 2, 0), g.ndim)), keepdims=True)
        return jnp.where(jnp.isfinite(most), g * (LARGEST / jnp.maximum(most, LARGEST)).astype(g.dtype), 0)

    return (jax.tree.map(scaled, cotangent),)


bounded.defvjp(lambda state: (state, None), _bound)


def _heads(function: Callable, batched: tuple[bool, ...]) -> Callable:
    """`function` of one head over B and H; arguments that are not batched have H only."""
    over_H = jax.vmap(function)
    return jax.vmap(over_H, in_axes=tuple(0 if b else None for b in batched))


def _where(mask_B: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(mask_B.reshape((-1,) + (1,) * (b.ndim - 1)), a, b), a, b)


def _turn(rule: Rule, state: State, begin: State, starts_B: Array, boundary_B: Array) -> State:
    """What happens before the first token of a chunk."""
    if state.anchor is None:
        begin = begin._replace(anchor=None)
    A, S, anchor = _where(starts_B, jax.tree.map(lambda x: x[None], begin), state)
    if rule.average:
        S = _where(boundary_B, jax.tree.map(jnp.zeros_like, S), S)
    return State(A, S, None if anchor is None else _where(boundary_B, A, anchor))


def _retained(rule: Rule, A: Weights) -> Weights:
    return A if rule.retention is None else {name: rule.retention(a) for name, a in A.items()}


def _plain(W: Weights) -> Lin:
    return lambda name, x: jnp.matmul(x, W[name], precision=HIGHEST)


def _pull(rule: Rule, W: Weights, k: Array, v: Array, threshold: Array | None, outer: Any) -> Weights:
    """The gradient of the bias in the weights, for the tokens given."""
    y, back = jax.vjp(lambda W: rule.memory(_plain(W), k, outer), W)
    return back(rule.slope(y, v, threshold))[0]


def recall(rule: Rule, q_BTHK: Array, weights: Weights, outer: Any = ()) -> Array:
    """What a memory of `weights`, [B, H, inputs, outputs] each, answers, y_BTHV; nothing is learned."""

    def head(q: Array, A: Weights, outer: Any) -> Array:
        return rule.memory(_plain(_retained(rule, A)), q, outer)

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
        slopes = _pull(rule, _retained(rule, anchor), one.k, one.v, one.threshold, outer)
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
        y = rule.memory(_plain(_retained(rule, seen)), one.q, outer)[0]
        return State(new_A, None if S is None else new_S, state.anchor), y

    every = _heads(token, (True, True, False, False) if row is None else (True, True, True, False))

    def step(state: State, timed: tuple[Token, Array]) -> tuple[State, Array]:
        x, pos_B = timed
        state = _turn(rule, bounded(state), begin, pos_B == 0, (pos_B >= 0) & (pos_B % C == 0))
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
    piece: Callable,
    loose: bool,
    remat: Remat,
    N: int,
    xs: Token,
    begin: State,
    outer: Any,
    row: Array | None,
    state: State,
    pos: Array,
) -> tuple[Array, State]:
    """Tokens laid out by chunk and slot, N chunks a row, and a scan over the chunks; empty ones cost nothing."""
    group = math.isqrt(N) if remat == "both" and N > 16 else 1
    N = -(-N // group) * group
    where = grid(pos, rule.chunk, N)
    # Zeros where there is no token: there no gate is open.
    chunks = jax.tree.map(lambda x: jnp.swapaxes(lay(where, x), 2, 3), xs)  # [N, B, H, C, ...]
    valid_NBC, pos_NBC = where.token_NBC < pos.shape[1], lay(where, pos, -1)
    starts_NB = jnp.any(pos_NBC == 0, -1)
    boundary_NB = jnp.any(valid_NBC & (pos_NBC % rule.chunk == 0), -1)
    if loose:
        state = state._replace(anchor=None)

    every = _heads(functools.partial(piece, rule), (True, True, False, False))

    def body(state: State, x: Any) -> tuple[State, Array]:
        x, valid_BC, starts_B, boundary_B = x

        def learn(state: State) -> tuple[State, Array]:
            state = _turn(rule, bounded(state), begin, starts_B, boundary_B)
            return every(state, bounded(x), row, bounded(outer))

        def rest(state: State) -> tuple[State, Array]:
            return state, jnp.zeros_like(x.v)

        return jax.lax.cond(jnp.any(valid_BC), learn, rest, state)

    inputs = (chunks, valid_NBC, starts_NB, boundary_NB)
    if remat != "none":
        body = jax.checkpoint(body, prevent_cse=False)
    state, y = _scan(body, state, inputs, group)
    if begin.anchor is not None and state.anchor is None:
        state = state._replace(anchor=state.weights)  # for the form; it is not wanted
    return gather(where, jnp.swapaxes(y, 2, 3)), state


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


def _dual(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """A chunk of one head; the weights of its tokens are never formed."""
    A, S = state.weights, state.momentum
    anchor = A if state.anchor is None else state.anchor
    base = anchor if rule.average else A
    tables = _tables(rule, x, row)
    C = x.k.shape[0]

    def tapped(bump: Weights) -> tuple[Array, Weights]:
        """The memory at the anchor, with room to push what each matrix answers; also what each one read."""
        seen: Weights = {}

        def lin(name: str, z: Array) -> Array:
            seen[name] = z
            return jnp.matmul(z, anchor[name], precision=HIGHEST) + bump[name]

        return rule.memory(lin, x.k, outer), seen

    still = {name: jnp.zeros((C, a.shape[-1]), a.dtype) for name, a in anchor.items()}
    answer, back, seen = jax.vjp(tapped, still, has_aux=True)
    pushed = back(rule.slope(answer, x.v, x.threshold))[0]
    pushed = {
        name: -x.gates[name].lr * slope for name, slope in pushed.items()
    }  # [C, outputs]: U_i is seen_i pushed_i^T

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


def _exact(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
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


def _materialised(rule: Rule, state: State, x: Token, row: Array | None, outer: Any) -> tuple[State, Array]:
    """A chunk of one head, with the weights of all of its tokens."""
    A, S = state.weights, state.momentum
    anchor = A if state.anchor is None else state.anchor
    base = anchor if rule.average else A
    W = _retained(rule, anchor)

    def one(x: Token) -> Weights:
        x = jax.tree.map(lambda a: a[None], x)
        return _pull(rule, W, x.k, x.v, x.threshold, outer)

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

    y = jax.vmap(lambda A, q: rule.memory(_plain(_retained(rule, A)), q[None], outer)[0])(seen, x.q)
    return State(_still(rule, x, new_A, A), None if S is None else new_S, state.anchor), y

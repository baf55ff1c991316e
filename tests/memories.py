"""Inputs of test-time memories, and their judges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.ops import fast_weights as fw
from layers.ops.memory_forms import Rule, State, Token
from layers.ops.test_time import Gate, test_time_memory

B, H, K, F = 2, 2, 6, 6  # few sizes: what an operation compiles to is shared
NETWORKS = {
    "linear": (fw.network("mlp", 1), fw.sizes("mlp", K, K, F, 1), False),
    "mlp": (fw.network("mlp", 2), fw.sizes("mlp", K, K, F, 2), True),
    "deep": (fw.network("mlp", 3, True), fw.sizes("mlp", K, K, F, 3, True), True),
    "swiglu": (fw.swiglu, fw.sizes("swiglu", K, K, F), False),
}
SLOPES = {
    "l2": fw.l2,
    "dot": fw.dot,
    "huber_norm": fw.huber_norm,
    "huber_coord": fw.huber_coord,
    "huber_mix": fw.huber_mix,
    "l3": functools.partial(fw.lp, 3.0),
    "l3_held": functools.partial(fw.lp, 3.0, largest=1.0),
}
RETENTIONS = {
    "kl": functools.partial(fw.kl, 2.0),
    "bounded": functools.partial(fw.bounded, 2.0),
    "lq_printed": functools.partial(fw.lq_printed, 4.0),
    "lq_mirror": functools.partial(fw.lq_mirror, 4.0),
    "elastic": functools.partial(fw.elastic, 0.05),
}


class Case:
    """Inputs of a memory, and the loss that weighs y and the state, each number by its own."""

    def __init__(
        self, T, network="mlp", slope="l2", *, momentum=True, keep=True, width="one", seed=0, average=False, **rule
    ):
        memory, self.shapes, norm = NETWORKS[network]
        self.rule = Rule(memory, SLOPES[slope], average=average, **rule)
        rng = np.random.default_rng(seed)

        def gate(outputs):
            g = outputs if width == "outputs" else 1

            def log(x):
                return jnp.asarray(np.log(x))

            return Gate(
                jnp.asarray(rng.uniform(0.02, 0.2, (B, T, H, g))),
                log(rng.uniform(0.7, 1, (B, T, H, g))) if keep and not average else None,
                log(rng.uniform(0.2, 0.9, (B, T, H, 1))) if momentum and not average else None,
            )

        k = rng.normal(size=(B, T, H, K))
        self.arrays = {
            "q": jnp.asarray(rng.normal(size=(B, T, H, K))),
            "k": jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True)),
            "v": jnp.asarray(rng.normal(size=(B, T, H, K))),
            "gates": {name: gate(outputs) for name, (_, outputs) in self.shapes.items()},
            "start": {name: jnp.asarray(rng.normal(size=(H, *s)) * s[0] ** -0.5) for name, s in self.shapes.items()},
            "outer": {"scale": jnp.asarray(rng.normal(size=(H, K))), "shift": jnp.asarray(rng.normal(size=(H, K)))}
            if norm
            else {},
            "threshold": jnp.asarray(rng.uniform(0.5, 2, (B, T, H, 1))) if "huber" in slope else None,
            "row": jnp.asarray(1 / np.arange(1, self.rule.chunk + 1) + rng.uniform(0, 0.1, (H, self.rule.chunk)))
            if average
            else None,
        }

    def call(self, arrays, pos, state=None, cut=slice(None), **options):
        def part(x):
            return x[:, cut]

        return test_time_memory(
            self.rule,
            part(arrays["q"]),
            part(arrays["k"]),
            part(arrays["v"]),
            jax.tree.map(part, arrays["gates"]),
            (arrays["start"], None),
            arrays["outer"],
            threshold=None if arrays["threshold"] is None else part(arrays["threshold"]),
            row=arrays["row"],
            state=state,
            pos=None if pos is None else part(pos),
            **options,
        )

    def graded(self, pos, weigh_state=1.0, **options):
        """[y, state, gradients]."""

        def loss(arrays):
            y, state = self.call(arrays, pos, **options)
            rng = np.random.default_rng(3)
            y = y if pos is None else jnp.where((pos >= 0)[..., None, None], y, 0)
            total = jnp.sum(y * rng.normal(size=y.shape))
            for leaf in jax.tree.leaves(state):
                total += weigh_state * jnp.sum(leaf * rng.normal(size=leaf.shape))
            return total, (y, state)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.arrays)
        return out, grads


def close(a, b, tolerance=1e-10) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / (np.linalg.norm(np.asarray(y)) + 1e-9)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def documents(T: int) -> Array:
    """A row that goes on in mid-chunk and holds short documents, one on the grid, with padding; and one plain row."""
    pos = np.arange(T)[None].repeat(B, 0)
    pos[0] += 3
    for start in (5, 6, 11, 19):
        pos[0, start:] = np.arange(max(T - start, 0))
    pos[1, 13:] = np.arange(T - 13)
    pos[1, 4:7] = -1
    pos[1, 7:13] -= 3
    pos[:, -2:] = -1
    return jnp.asarray(pos, jnp.int32)


def one_by_one(rule: Rule, state: State, x: Token, row, outer) -> tuple[State, Array]:
    """A chunk of one head by the equations, in a loop of Python: the judge of what works on whole chunks."""
    A, S, anchor = state[:3]
    base, ys = anchor or A, []
    W = base if rule.retention is None else jax.tree.map(rule.retention, base)
    for t in range(x.k.shape[0]):
        k, v, q = x.k[t : t + 1], x.v[t : t + 1], x.q[t : t + 1]
        threshold = None if x.threshold is None else x.threshold[t : t + 1]
        answer, back = jax.vjp(lambda W, k=k: rule.memory(lambda n, z: z @ W[n], k, outer), W)
        slope, before, A = back(rule.slope(answer, v, threshold))[0], A, dict(A)
        S = None if S is None else dict(S)
        for name, gate in x.gates.items():
            lr, apply = gate.lr[t : t + 1], gate.apply[t : t + 1]
            U = -lr * slope[name]
            if S is not None:
                U = S[name] = U + (S[name] if rule.average else jnp.exp(gate.log_momentum[t : t + 1]) * S[name])
            if rule.average:
                A[name] = base[name] + row[t] * U
                continue
            U = U if rule.step is None else rule.step(U)
            keep = 1.0 if gate.log_keep is None else jnp.exp(gate.log_keep[t : t + 1])
            A[name] = keep * A[name] + apply * U
        seen = before if rule.read == "pre" else A
        seen = seen if rule.retention is None else jax.tree.map(rule.retention, seen)
        ys.append(rule.memory(lambda name, z, seen=seen: z @ seen[name], q, outer))
    return State(A, S, anchor), jnp.concatenate(ys)


def judge(engines, tolerance=1e-10, slopes=True, **options) -> None:
    """A chunk of one head that starts with momentum and off its anchor: values, state and, by `slopes`, gradients.

    Never compiled as a whole: the small programs of its operations are shared by all cases.
    """
    case = Case(5, chunk=5, **options)
    rng = np.random.default_rng(8)
    a = jax.tree.map(lambda x: x[0, :, 0], {name: case.arrays[name] for name in ("q", "k", "v", "gates", "threshold")})
    gates = {n: g._replace(apply=jnp.asarray(rng.uniform(0.5, 1, (5, 1)))) for n, g in a["gates"].items()}
    A, S, anchor = ({n: jnp.asarray(rng.normal(size=s)) for n, s in case.shapes.items()} for _ in range(3))
    held = case.rule.average or options.get("momentum", True)
    state = State(A, S if held else None, anchor)
    if case.rule.average:  # a chunk with a token in its first slot starts at its anchor
        state = State(A, jax.tree.map(jnp.zeros_like, A), A)
    outer, row = jax.tree.map(lambda x: x[0], (case.arrays["outer"], case.arrays["row"]))

    def graded(engine):
        def loss(state, x, row, outer):
            state, y = engine(case.rule, state, x, row, outer)
            total, rng = 0.0, np.random.default_rng(3)
            for leaf in jax.tree.leaves((y, state)):
                total += jnp.sum(leaf * rng.normal(size=leaf.shape))
            return total, (y, state)

        args = state, Token(a["q"], a["k"], a["v"], gates, a["threshold"]), row, outer
        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*args) if slopes else loss(*args)

    want = graded(one_by_one)
    for engine in engines:
        close(graded(engine), want, tolerance)

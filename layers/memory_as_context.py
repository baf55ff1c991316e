"""Memory as context: each segment attends to itself and to what a long-term memory says of its tokens.

    h = M_before(x W_Q)        y = attention([persistent | h | x])        M learns y        o = norm(y) ∘ σ(norm(M(y)))

M_before is the memory as the segment before left it (Titans, arXiv 2501.00663, section 4.1). Read to the letter the
paper leaks: under a plain causal mask token i sees the h of later tokens, and the memory at the segment's end has
learned them. Here token i sees h_j and x_j for j <= i, and asks the memory as it is after token i, or as it was before
the segment.

Attention ends with the segment: what is older is in the memory alone. So segments come one after the other.
"""

import dataclasses
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.memory_as_gate import Combine, How
from layers.norm import RMSNorm
from layers.ops.attention import attention
from layers.ops.chunk_loop import SHORT, over_chunks
from layers.ops.precision import wide
from layers.ops.rope import rope
from layers.ops.test_time import Implementation, Weights, bounded, rows
from layers.test_time import TestTimeMemory, TestTimeState
from layers.titans import Titans


@dataclasses.dataclass(frozen=True)
class MemoryAsContext(LayerConfig):
    """H, K: heads of the attention and their width; None: D / H. memory: any test-time memory.

    segment: tokens of a document that attend to each other, counted from its start.
    persistent: learned tokens before each segment.
    context: None: the memory says something of each token, which later ones see too. A number: of that many learned
        questions instead, asked once a segment.
    write: what the memory learns, and is asked: "attn_out", y as in the paper, or "input", x.
    readout: the memory that gates: as it is after each token, or as it was before its segment.
    combine: as in MemoryAsGate. rope_theta: of the places within a segment. implementation: "naive", token by token.
    """

    memory: TestTimeMemory = Titans()
    H: int = 4
    K: int | None = None
    segment: int = 512
    persistent: int = 128
    context: int | None = None
    write: Literal["attn_out", "input"] = "attn_out"
    readout: Literal["token", "segment"] = "token"
    combine: How = "sigmoid"
    rope_theta: float = 10_000.0
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "segment", "context", "rope_theta")
        one_of(self)
        if self.persistent < 0:
            raise ValueError(f"MemoryAsContext.persistent is {self.persistent}: it must be at least 0")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MemoryAsContextLayer":
        return MemoryAsContextLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        memory = Titans(H=2, K=8, F=6, chunk=4)
        return (
            cls(memory, H=2, segment=8, persistent=2),
            cls(memory, H=2, segment=8, persistent=0, context=3, write="input", readout="segment", combine="convex"),
        )


class MemoryAsContextState(NamedTuple):
    """before: the memory's weights as the segment began. The cache: persistent tokens, then questions, h and x."""

    memory: TestTimeState
    before: Weights
    keys_BHSK: Array
    values_BHSV: Array


class MemoryAsContextLayer(Layer):
    def __init__(self, config: MemoryAsContext, D: int, *, rngs: nnx.Rngs):
        c, H, K = config, config.H, head_size(config, "K", D)
        even(config, K)
        self.config, self.K = config, K
        self.memory = config.memory.build(D, rngs=rngs)
        self.query, self.key = (Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, rngs=rngs) for _ in range(2))
        self.value = Einsum("BTD,DHV->BTHV", D=D, H=H, V=K, rngs=rngs)
        self.out = Einsum("BTHV,HVD->BTD", D=D, H=H, V=K, rngs=rngs)
        self.norm = RMSNorm(D)
        heads, width = config.memory.H, self.memory.K
        self.ask = Einsum("BTD,DHK->BTHK", D=D, H=heads, K=width, rngs=rngs)
        self.told = RMSNorm(width, axes="V")
        self.tell = Einsum("BTHV,HVD->BTD", D=D, H=heads, V=width, rngs=rngs)
        self.combine = Combine(c.combine, D)
        self.persistent, self.questions = (
            nnx.Param(jax.random.normal(rngs.params(), [n, D], jnp.float32), axes="SD") if n else None
            for n in (c.persistent, c.context)
        )

    @property
    def ahead(self) -> int:
        """Entries of the cache before the tokens'."""
        return self.config.persistent + (self.config.context or 0)

    def init_state(self, B: int, T: int) -> MemoryAsContextState:
        return self._empty(B, T, self.config.segment)

    def _empty(self, B: int, T: int, L: int) -> MemoryAsContextState:
        """L: tokens of a segment that there is room for."""
        c, memory = self.config, self.memory.init_state(B, T)
        S = self.ahead + L * (2 if c.context is None else 1)
        cache = jnp.zeros((B, c.H, S, self.K), jnp.float32)
        return MemoryAsContextState(memory, memory.learner.weights, cache, cache)

    def __call__(self, x_BTD: Array, tokens: Tokens, state: MemoryAsContextState | None = None) -> Out:
        B, T = tokens.pos_BT.shape
        dtype, given, pos_BT = wide(x_BTD), state, tokens.pos_BT
        L = self.config.segment
        if state is None:  # places begin at the row's start, so that a short row never fills a segment
            L = min(T, L)
            state = self._empty(B, T, L)
        state = jax.tree.map(lambda a: a.astype(dtype), state)
        if self.config.implementation == "naive" or T <= SHORT:
            y, new, aux = self._by_token(x_BTD, pos_BT, state)
        else:
            y, new, aux = self._by_segment(x_BTD, pos_BT, state, L)
        if given is None:
            return Out(y, None, aux)
        return Out(y, jax.tree.map(lambda new, old: new.astype(old.dtype), new, given), aux)

    def _by_token(self, x_BTD: Array, pos_BT: Array, state: MemoryAsContextState):
        """The definition."""

        def body(state: MemoryAsContextState, token: tuple[Array, Array]):
            state, (y, aux) = self._piece(state, token[0][:, None], token[1][:, None])
            return state, (y[:, 0], {name: jnp.broadcast_to(a, pos_BT.shape[:1]) for name, a in aux.items()})

        state, (y, aux) = jax.lax.scan(
            jax.checkpoint(body, prevent_cse=False), state, (x_BTD.swapaxes(0, 1), pos_BT.swapaxes(0, 1))
        )
        return y.swapaxes(0, 1), state, _average(aux, pos_BT.T >= 0)

    def _by_segment(self, x_BTD: Array, pos_BT: Array, state: MemoryAsContextState, L: int):
        """L: the most tokens that a segment of these rows has."""
        graph, parameters = nnx.split(self)

        def body(parameters: nnx.State, state: MemoryAsContextState, x_BLD: Array, pos_BL: Array):
            state, (y, aux) = nnx.merge(graph, parameters)._piece(state, x_BLD, pos_BL)
            return state, (y, {name: jnp.broadcast_to(a, pos_BL.shape) for name, a in aux.items()})

        (y, aux), state = over_chunks(body, parameters, state, x_BTD, pos_BT, L)
        return y, state, _average(aux, pos_BT >= 0)

    def _piece(self, state: MemoryAsContextState, x_BWD: Array, pos_BW: Array):
        """W tokens of one segment a row, at increasing places; with padding anywhere."""
        c, A = self.config, self.ahead
        state = bounded(state)  # what a memory said shapes what it learns next: one more way to be chaotic
        dtype = state.keys_BHSK.dtype
        slot_BW = jnp.where(pos_BW >= 0, pos_BW % c.segment, -1)
        begins_B = jnp.any(slot_BW == 0, 1)
        before = self._before(state, jnp.any(pos_BW == 0, 1), begins_B)
        cache: tuple[Array, ...] = (state.keys_BHSK, state.values_BHSV)
        if A:
            fresh = lambda: self._ahead(before, x_BWD.dtype)  # noqa: E731
            shapes = jax.eval_shape(fresh)
            zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)  # noqa: E731
            new = jax.lax.cond(jnp.any(begins_B), fresh, zeros)
            cache = tuple(
                a.at[:, :, :A].set(jnp.where(begins_B[:, None, None, None], n, a[:, :, :A]))
                for a, n in zip(cache, new, strict=True)
            )
        streams = [x_BWD] if c.context is not None else [self._say(x_BWD, before), x_BWD]
        L = (state.keys_BHSK.shape[2] - A) // len(streams)
        for i, stream in enumerate(streams):
            cache = self._store(cache, stream, slot_BW, A + i * L)
        own_S = jnp.arange(L, dtype=jnp.int32)
        key_time_S = jnp.concatenate([jnp.zeros(A, jnp.int32), *[own_S] * len(streams)])
        y_BWHV = attention(
            self._turned(self.query, x_BWD, jnp.maximum(slot_BW, 0) + A).astype(dtype),
            *cache,
            query_time=slot_BW,
            key_time=jnp.broadcast_to(key_time_S, (x_BWD.shape[0], len(key_time_S))),
            head_major=True,
        )
        y_BWD = self.norm(self.out(y_BWHV.astype(x_BWD.dtype)))
        learned = y_BWD if c.write == "attn_out" else x_BWD
        held = self.memory.learn(learned, pos_BW, state.memory, chunks=-(-L // self.memory.rule.chunk) + 1)
        m_BWD = held.y_BTD if c.readout == "token" else self._say(learned, before)
        return MemoryAsContextState(held.state, before, *cache), (self.combine(y_BWD, m_BWD), held.aux)

    def _before(self, state: MemoryAsContextState, starts_B: Array, begins_B: Array) -> Weights:
        """The weights with which each row's segment began."""
        first, _ = self.memory.begin(wide(*jax.tree.leaves(state.before)))

        def pick(mask_B: Array, a: Weights, b: Weights) -> Weights:
            return jax.tree.map(lambda a, b: jnp.where(mask_B[:, None, None, None], a, b), a, b)

        now = pick(starts_B, rows(starts_B, first), state.memory.learner.weights)
        return pick(begins_B, now, state.before)

    def _say(self, x_BWD: Array, weights: Weights) -> Array:
        """What a memory of `weights` says of x."""
        return self.tell(self.told(self.memory.recall(self.ask(x_BWD), weights)))

    def _turned(self, project: Einsum, x_BWD: Array, place_BW: Array) -> Array:
        return rope(project(x_BWD), place_BW, self.config.rope_theta)

    def _ahead(self, before: Weights, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Keys and values of the persistent tokens and of what the memory says to the questions; [B, H, A, K] each."""
        B = next(iter(before.values())).shape[0]
        rows = []
        if self.persistent is not None:
            rows.append(jnp.broadcast_to(self.persistent[...].astype(dtype)[None], (B, *self.persistent.shape)))
        if self.questions is not None:
            asked = jnp.broadcast_to(self.questions[...].astype(dtype)[None], (B, *self.questions.shape))
            rows.append(self._say(asked, before))
        x_BAD = jnp.concatenate(rows, 1)
        place_BA = jnp.broadcast_to(jnp.arange(self.ahead, dtype=jnp.int32), (B, self.ahead))
        kind = next(iter(before.values())).dtype
        k, v = self._turned(self.key, x_BAD, place_BA), self.value(x_BAD)
        return k.swapaxes(1, 2).astype(kind), v.swapaxes(1, 2).astype(kind)

    def _store(self, cache: tuple[Array, ...], x_BWD: Array, slot_BW: Array, offset: int) -> tuple[Array, ...]:
        k = self._turned(self.key, x_BWD, jnp.maximum(slot_BW, 0) + self.ahead)
        S = cache[0].shape[2]
        at_BW = jnp.where(slot_BW >= 0, offset + slot_BW, S)  # S is no place
        put = jax.vmap(lambda ring, new, at_W: ring.at[:, at_W].set(new.astype(ring.dtype), mode="drop"))
        return tuple(put(a, n.swapaxes(1, 2), at_BW) for a, n in zip(cache, (k, self.value(x_BWD)), strict=True))


def _average(aux: dict[str, Array], valid: Array) -> dict[str, Array]:
    """Over the tokens, of what was said of each one's piece."""
    number = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
    return {name: jnp.sum(jnp.where(valid, a, 0)) / number for name, a in aux.items()}

"""Mixture of memories (Du et al. 2025, arXiv 2502.13685): a token is written to, and read from, a few of M memories.

    p_t = softmax(W x_t)        w_t = the largest `top` of p_t, divided by their sum
    y_t = sum over those m of w_tm · memory_m(q_t; k_t^m, v_t^m, ...)  +  the shared memory's answer

The memories are those of any recurrent layer. Each has its own maps for what is written; query, convolutions, decay's
constants, norm, output gate and output map are common, and norm and gate follow the sum. A memory reads the tokens that
come to it as if they were the whole text: its convolution too, and it forgets nothing for a token that went elsewhere.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.gated_deltanet import GatedDeltaNet
from layers.gla import GLA
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.linear import LinearAttention
from layers.ops.chunk_loop import over_chunks
from layers.ops.precision import HIGHEST, wide
from layers.ops.routing import by_memory, collect, largest, places, spread, stream
from layers.recurrent import Maps, Recurrent

CHUNK = 64  # tokens of each memory that a turn takes where a state goes on


@dataclasses.dataclass(frozen=True)
class MixtureOfMemories(LayerConfig):
    """base: the recurrent layer whose memories are mixed. M: how many; top: to how many of them a token goes.

    shared: one memory more, which every token goes to, with weight 1.
    projections: "own": each memory has maps for what is written; "one": all have the same ones.
    balance: weight of the loss that keeps the memories equally used, M · sum of (share of the tokens that memory m
        gets) · (mean p of m), which is `top` where they are.
    implementation: "naive" runs every memory over all tokens, those that go elsewhere being padding: the definition.
        "chunked" sorts the tokens by memory and reads them in one stream: the cost of `top` layers, not of M.
    """

    base: LayerConfig = GatedDeltaNet()
    M: int = 4
    top: int = 2
    shared: bool = True
    projections: Literal["own", "one"] = "own"
    balance: float = 1e-3
    implementation: Literal["auto", "naive", "chunked"] = "auto"

    def __post_init__(self):
        positive(self, "M", "top")
        one_of(self)
        if self.top > self.M:
            raise ValueError(f"MixtureOfMemories.top is {self.top}: it must be at most M = {self.M}")
        if self.balance < 0:
            raise ValueError(f"MixtureOfMemories.balance is {self.balance}: it must be at least 0")
        if getattr(self.base, "persistent", 0):
            raise ValueError("MixtureOfMemories.base has persistent tokens, which no memory would own: say 0")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MixtureLayer":
        return MixtureLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(GatedDeltaNet(H=2, K=6, V=8, chunk=8)),
            cls(GLA(H=2, K=6, V=8, conv=3, chunk=8), M=3, top=1, shared=False),
            cls(LinearAttention(H=2, K=6, V=8, chunk=8), M=3, projections="one", balance=0.1),
        )


class MixtureState(NamedTuple):
    """memories: the base's state with a leading axis more, [B, M, ...]. shared: the base's, or ().

    count_BM: int32, tokens of the present document that each memory holds.
    """

    memories: Any
    count_BM: Array
    shared: Any


class MixtureLayer(Layer):
    def __init__(self, config: MixtureOfMemories, D: int, *, rngs: nnx.Rngs):
        self.config = config
        self.router = Einsum("BTD,DM->BTM", D=D, M=config.M, rngs=rngs)
        base = config.base.build(D, rngs=rngs)
        if not isinstance(base, Recurrent):
            raise ValueError(
                f"MixtureOfMemories.base is {type(config.base).__name__}, whose memory cannot be told apart from its "
                "maps: use LinearAttention, GLA, DeltaNet, GatedDeltaNet, KDA, MomentumDeltaNet or TestTimeMemory"
            )
        own = config.projections == "own"
        self.each = _several(config.base, D, jax.random.split(rngs.params(), config.M)) if own else None
        if own and not config.shared:
            base.written = None  # type: ignore[assignment]
        self.base = base

    def init_state(self, B: int, T: int) -> MixtureState:
        c = self.config
        memories = jax.tree.map(lambda a: a.reshape(B, c.M, *a.shape[1:]), self.base.init_state(B * c.M, T))
        shared = self.base.init_state(B, T) if c.shared else ()
        return MixtureState(memories, jnp.zeros((B, c.M), jnp.int32), shared)

    def __call__(self, x_BTD: Array, tokens: Tokens, state: MixtureState | None = None) -> Out:
        c, pos, dtype = self.config, tokens.pos_BT, wide(x_BTD)
        # In full float32 wherever it runs: rounded otherwise, a token would go elsewhere when it is decoded.
        router_DM = self.router.w[...].astype(dtype)
        p_BTM = jax.nn.softmax(jnp.einsum("BTD,DM->BTM", x_BTD.astype(dtype), router_DM, precision=HIGHEST), -1)
        chosen_BTkM = jnp.stack(largest(p_BTM, c.top), 2)
        weight_BTk = jnp.sum(jnp.where(chosen_BTkM, p_BTM[:, :, None], 0), -1)
        # Of one alone it is 1, and has no slope.
        weight_BTk = weight_BTk / jnp.sum(weight_BTk, -1, keepdims=True) if c.top > 1 else jnp.ones_like(weight_BTk)
        routed_BTkM = (chosen_BTkM & (pos >= 0)[..., None, None]).astype(jnp.int32)  # padding goes nowhere
        before = jnp.zeros_like(routed_BTkM[:, 0, 0]) if state is None else state.count_BM
        place_BTM, count_BM = places(routed_BTkM, pos, before)

        q = self.base.query(x_BTD)
        memories = None if state is None else state.memories
        if c.implementation != "naive" and state is None:
            y_BTHV = self._stream(q, x_BTD, weight_BTk, routed_BTkM, place_BTM)
        elif c.implementation != "naive" and x_BTD.shape[1] == 1:
            y_BTHV, memories = self._token(q, x_BTD, weight_BTk, chosen_BTkM, place_BTM, memories)
        else:
            weight_BTM = jnp.einsum("BTk,BTkM->BTM", weight_BTk, routed_BTkM.astype(dtype))
            run = self._dense if c.implementation == "naive" else self._compact
            y_BTMHV, memories = run(q, x_BTD, place_BTM, memories)
            y_BTHV = jnp.einsum("BTM,BTMHV->BTHV", weight_BTM, y_BTMHV.astype(dtype))
            y_BTHV = y_BTHV.astype(x_BTD.dtype)

        shared: Any = ()
        aux: dict[str, Array] = {}
        if c.shared:
            y, shared, aux = self.base.run(q, self.base.written(x_BTD), pos, None if state is None else state.shared)
            y_BTHV = y_BTHV + y
        aux = aux | self._said(p_BTM, routed_BTkM, pos)
        after = None if state is None else MixtureState(memories, count_BM, shared)
        return Out(self.base.finish(y_BTHV, x_BTD), after, aux)

    def _said(self, p_BTM: Array, routed_BTkM: Array, pos_BT: Array) -> dict[str, Array]:
        """The balance loss, and how the router spreads tokens.

        load: the share of the busiest memory, 1 where all are equal. entropy of p, as a share of log M.
        specialisation: how much which memory it is says of the token, in the same unit; 0 where all tokens are alike.
        """
        c = self.config
        valid_BT1 = (pos_BT >= 0)[..., None]
        number = jnp.maximum(jnp.sum(valid_BT1, dtype=p_BTM.dtype), 1)
        share_M = jnp.sum(routed_BTkM.astype(p_BTM.dtype), (0, 1, 2)) / number
        mean_M = jnp.sum(jnp.where(valid_BT1, p_BTM, 0), (0, 1)) / number
        entropy_BT1 = -jnp.sum(jax.scipy.special.xlogy(p_BTM, p_BTM), -1, keepdims=True)
        unit = jnp.log(jnp.asarray(max(c.M, 2), p_BTM.dtype))
        entropy = jnp.sum(jnp.where(valid_BT1, entropy_BT1, 0)) / number / unit
        of_mean = -jnp.sum(jax.scipy.special.xlogy(mean_M, mean_M)) / unit
        said = {
            "loss/balance": c.balance * c.M * jnp.sum(share_M * mean_M),
            "load": jnp.max(share_M) * c.M / c.top,
            "entropy": jax.lax.stop_gradient(entropy),
            "specialisation": jax.lax.stop_gradient(of_mean - entropy),
        }
        return {name: value.astype(jnp.float32) for name, value in said.items()}

    def _told(self, x_BTD: Array) -> Any:
        """What each memory would be told by each token: a tree of [B, T, M, ...]."""
        if self.each is None:
            return jax.tree.map(lambda a: jnp.repeat(a[:, :, None], self.config.M, 2), self.base.written(x_BTD))
        return jax.vmap(lambda maps: maps(x_BTD), out_axes=2)(self.each)

    def _stream(self, q: Array, x_BTD: Array, weight_BTk: Array, routed_BTkM: Array, place_BTM: Array) -> Array:
        """Training: all memories' tokens in one row, one after the other, as documents are packed."""
        at = stream(routed_BTkM, place_BTM)
        if self.each is None:
            told = jax.tree.map(lambda a: spread(a, at), self.base.written(x_BTD))
        else:
            told = by_memory(_call, self.each, spread(x_BTD, at), at)
        y_BSHV, _, _ = self.base.run(spread(q, at), told, at.pos_BS)
        y_BTkHV = collect(y_BSHV, at)
        return jnp.einsum("BTk,BTkHV->BTHV", weight_BTk, y_BTkHV.astype(weight_BTk.dtype)).astype(x_BTD.dtype)

    def _token(
        self, q: Array, x_B1D: Array, weight_B1k: Array, chosen_B1kM: Array, place_B1M: Array, memories: Any
    ) -> tuple[Array, Any]:
        """One token: only the memories that it goes to are read and written."""
        (B, _, k, _), index_Bk = chosen_B1kM.shape, jnp.argmax(chosen_B1kM[:, 0], -1)

        def pick(a: Array) -> Array:  # [B, M, ...] -> [B k, ...]
            return jnp.take_along_axis(a, index_Bk.reshape(B, k, *(1,) * (a.ndim - 2)), 1).reshape(B * k, *a.shape[2:])

        told = jax.tree.map(lambda a: pick(a[:, 0])[:, None], self._told(x_B1D))
        pos = pick(place_B1M[:, 0])[:, None]
        y, after, _ = self.base.run(jnp.repeat(q, k, 0), told, pos, jax.tree.map(pick, memories))

        def put(a: Array, new: Array) -> Array:
            return a.at[jnp.arange(B)[:, None], index_Bk].set(new.reshape(B, k, *new.shape[1:]), unique_indices=True)

        y_B1kHV = jnp.moveaxis(y.reshape(B, k, 1, *y.shape[2:]), 1, 2)
        weight_B1k = jnp.where(pos.reshape(B, 1, k) >= 0, weight_B1k, 0)
        y_B1HV = jnp.einsum("BTk,BTkHV->BTHV", weight_B1k, y_B1kHV.astype(weight_B1k.dtype))
        return y_B1HV.astype(x_B1D.dtype), jax.tree.map(put, memories, after)

    def _dense(self, q: Array, x_BTD: Array, place_BTM: Array, memories: Any) -> tuple[Array, Any]:
        """The definition: a row for each memory. y_BTMHV."""
        B, _, M = place_BTM.shape

        def rows(a_BTM: Array) -> Array:
            return jnp.moveaxis(a_BTM, 2, 1).reshape(B * M, *a_BTM.shape[1:2], *a_BTM.shape[3:])

        told = jax.tree.map(rows, self._told(x_BTD))
        state = jax.tree.map(lambda a: a.reshape(B * M, *a.shape[2:]), memories)
        y, state, _ = self.base.run(jnp.repeat(q, M, 0), told, rows(place_BTM), state)
        memories = jax.tree.map(lambda a: a.reshape(B, M, *a.shape[1:]), state)
        return jnp.moveaxis(y.reshape(B, M, *y.shape[1:]), 1, 2), memories

    def _compact(self, q: Array, x_BTD: Array, place_BTM: Array, memories: Any) -> tuple[Array, Any]:
        """As _dense, with a state that goes on: as many turns as the busiest memory has chunks, without its padding."""
        B, T, M = place_BTM.shape
        graph, parameters = nnx.split(self)

        def body(parameters: nnx.State, state: Any, token: tuple[Array, Array], pos: Array):
            layer, (q, x) = nnx.merge(graph, parameters), token
            told = layer._rows(x.reshape(B, M, *x.shape[1:]))
            y, state, _ = layer.base.run(q, told, pos, state)
            return state, y

        rows = jax.tree.map(lambda a: jnp.repeat(a, M, 0), (q, x_BTD))
        state = jax.tree.map(lambda a: a.reshape(B * M, *a.shape[2:]), memories)
        place = jnp.moveaxis(place_BTM, 2, 1).reshape(B * M, T)
        y, state = over_chunks(body, parameters, state, rows, place, CHUNK)
        memories = jax.tree.map(lambda a: a.reshape(B, M, *a.shape[1:]), state)
        return jnp.moveaxis(y.reshape(B, M, *y.shape[1:]), 1, 2), memories

    def _rows(self, x_BMCD: Array) -> Any:
        """What each memory is told by tokens of its own: a tree of [B M, C, ...]."""
        if self.each is None:
            return self.base.written(x_BMCD.reshape(-1, *x_BMCD.shape[2:]))
        told = jax.vmap(_call, in_axes=(0, 1), out_axes=1)(self.each, x_BMCD)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), told)


def _call(maps: Maps, x: Array) -> Any:
    return maps(x)


def _several(base: LayerConfig, D: int, keys: Array) -> Maps:
    """What the base has for writing, as many times as there are keys, stacked."""

    def one(key: Array) -> Any:
        layer = base.build(D, rngs=nnx.Rngs(params=key))
        assert isinstance(layer, Recurrent)
        return layer.written

    maps = jax.vmap(one)(keys)
    for variable in jax.tree.leaves(maps, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable.set_metadata(axes="M" + variable.get_metadata()["axes"])
    return maps

"""Chunk attention: each token reads, in full, the few chunks of its past whose summaries answer it best.

Hierarchical chunk attention (Lampinen et al. 2021, "Towards mental time travel", arXiv 2105.14039), for a layer of a
language model: what a chunk holds are the layer's inputs, and its summary is their mean. With other weights it is
mixture of block attention (MoBA, Lu et al. 2025, arXiv 2502.13189) or has the three branches of native sparse attention
(NSA, Yuan et al. 2025, arXiv 2502.11089). layers/ops/chunk_select.py has the equations.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.ops.chunk_loop import read
from layers.ops.chunk_select import Counts, Near, Places, chunk_attention, lay, places
from layers.ops.precision import wide
from layers.ops.rope import rope


class ChunkState(NamedTuple):
    """S slots: complete chunks one after the other, then the unfinished one, which the next document writes over.

    summary_BSF: that of chunk n is spread over slots n R .. n R + R - 1, F numbers in each; R is the least that a chunk
    holds. end_BS: with a boundary, where chunk n ends is in slot n; else None. sum_BGF: of the unfinished chunk.
    """

    keys_BHSK: Array
    values_BHSV: Array
    summary_BSF: Array
    end_BS: Array | None
    sum_BGF: Array
    counts: Counts


@dataclasses.dataclass(frozen=True)
class ChunkAttention(LayerConfig):
    """y = W_out · (what was read of the `top` best of the complete chunks of the document that lie before the token).

    chunk: tokens of a chunk; the first chunk begins with the document. top: chunks that a token reads.
    boundary: entries of the vocabulary with which a chunk ends, such as a full stop, the line break behind what a
        speaker says, or what stands between documents of a text. Chunks are then sentences, turns or documents, of
        `chunk` tokens at most: a longer one is cut there. (): every chunk has `chunk` tokens.
    least: tokens that a chunk has at least: before that nothing ends it. Of few tokens there are many chunks; None: a
        quarter of `chunk`, rounded up.
    H, K: heads, and channels of each; None = D / H.
    F: width of the score <W x, W' mean> / sqrt(F) of product; None = K.
    weight: "product": softmax over the chosen chunks times softmax over the tokens of each (HCAM). The first chunk of
        a document reads nothing and answers zero: say a window, or put such a layer beside attention.
        "union": each head chooses by its query and the mean of a chunk's keys, and one softmax is over all tokens of
        the chosen chunks and of the token's own, up to itself (MoBA). The choice has no gradient.
        "gated": each head reads three times: the means of all chunks' keys and values; the chunks that it scores best
        by those; the window. Sigmoids of a linear map of x weigh the three (NSA).
    window: a token also sees the last so many, itself included, under a softmax of its own; None = not. With product
        it is added; gated takes one; union has the token's own chunk instead.
    position: what keys and values know of their place. "chunk": a sinusoidal code of the place in the chunk, counted
        from its end (or from where it would end if it were full), added to what the maps of both read (HCAM); "rope":
        queries and keys turned by their place in the document; "none".
    stop_gradient: no gradient into what is remembered, only into the maps that read it (HCAM in reinforcement
        learning). A token that sees no other then learns nothing through this layer.
    cache_dtype: "float32" or "bfloat16", of keys and values in the state.
    implementation: "naive" scores every token of every chunk: the definition. "chunked" fetches what was chosen.

    Chunks are chosen in float32, by keys and queries that are computed in it.
    Parameters: 4 D H K, + 2 D F with product, + 3 D H with gated. State: S = max(T, chunk) slots of 2 H K numbers of
    `cache_dtype` and 1 / chunk of a float32 summary: F, H K or, with gated, 2 H K numbers, rounded up to whole slots.
    With a boundary it is 1 / least of one, and an int32; and a token scores T / least chunks, however few there are.
    """

    H: int = 4
    K: int | None = None
    F: int | None = None
    chunk: int = 32
    top: int = 4
    boundary: tuple[int, ...] = ()
    least: int | None = None
    weight: Literal["product", "union", "gated"] = "product"
    window: int | None = None
    position: Literal["chunk", "rope", "none"] = "chunk"
    stop_gradient: bool = False
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    implementation: Literal["auto", "naive", "chunked"] = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "F", "chunk", "top", "least", "window")
        one_of(self)
        if self.least is not None and not self.boundary:
            raise ValueError(f"ChunkAttention.least is {self.least}: without a boundary all have `chunk`, so say None")
        if (self.least or 1) > self.chunk:
            raise ValueError(f"ChunkAttention.least is {self.least}: it must be at most chunk = {self.chunk}")
        if min(self.boundary, default=0) < 0:
            raise ValueError(f"ChunkAttention.boundary is {self.boundary}: entries of a vocabulary are at least 0")
        if self.weight == "union" and self.window is not None:
            raise ValueError(f"ChunkAttention.window is {self.window}: union sees its own chunk instead, so say None")
        if self.weight == "gated" and self.window is None:
            raise ValueError(f"ChunkAttention.window is None: gated has a window, so say one, such as {2 * self.chunk}")
        if self.weight != "product" and self.F is not None:
            raise ValueError(f"ChunkAttention.F is {self.F}: {self.weight} scores by its keys, so say None")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "ChunkAttentionLayer":
        return ChunkAttentionLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=2, K=8, chunk=4, top=2, window=4),
            cls(H=2, K=8, chunk=4, top=2, weight="union", position="rope", implementation="chunked"),
            cls(H=2, K=8, chunk=4, top=2, weight="gated", window=6, position="none", implementation="chunked"),
            cls(H=2, K=8, chunk=7, top=2, boundary=tuple(range(0, 50, 5)), window=4),
            cls(H=2, K=8, chunk=6, top=2, boundary=(3, 9, 27), least=3, weight="union", implementation="chunked"),
        )


class ChunkAttentionLayer(Layer):
    def __init__(self, config: ChunkAttention, D: int, *, rngs: nnx.Rngs):
        H, K, product = config.H, head_size(config, "K", D), config.weight == "product"
        F = config.F or K
        if config.position == "rope":
            even(config, K)
        self.config, self.K = config, K
        self.least = (config.least or -(-config.chunk // 4)) if config.boundary else config.chunk
        # What is summed over a chunk, for G groups of heads: a map of x; keys; keys and values.
        self.G, self.F = (1, F) if product else (H, K if config.weight == "union" else 2 * K)
        self.query = Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, rngs=rngs)
        self.key = Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, rngs=rngs)
        self.value = Einsum("BTD,DHV->BTHV", D=D, H=H, V=K, rngs=rngs)
        self.ask = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs) if product else None
        self.summary = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs) if product else None
        self.gate = Einsum("BTD,DMH->BTMH", D=D, M=3, H=H, rngs=rngs) if config.weight == "gated" else None
        self.out = Einsum("BTHV,HVD->BTD", D=D, H=H, V=K, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> ChunkState:
        """An empty cache for T tokens: a longer piece raises ValueError, and a token without a slot reads NaN."""
        return self._empty(B, T, jnp.dtype(self.config.cache_dtype), jnp.dtype(jnp.float32))

    def _empty(self, B: int, T: int, dtype: jnp.dtype, kind: jnp.dtype) -> ChunkState:
        H, K, S = self.config.H, self.K, max(T, self.config.chunk)
        return ChunkState(
            keys_BHSK=jnp.zeros((B, H, S, K), dtype),
            values_BHSV=jnp.zeros((B, H, S, K), dtype),
            summary_BSF=jnp.zeros((B, S, -(-self.G * self.F // self.least)), kind),
            end_BS=jnp.zeros((B, S), jnp.int32) if self.config.boundary else None,
            sum_BGF=jnp.zeros((B, self.G, self.F), kind),
            counts=Counts(*(jnp.zeros(B, jnp.int32) for _ in Counts._fields)),  # one array twice could not be donated
        )

    def __call__(self, x_BTD: Array, tokens: Tokens, state: ChunkState | None = None) -> Out:
        c, (B, T, _), kind, pos_BT = self.config, x_BTD.shape, wide(x_BTD), tokens.pos_BT
        # Training reads a cache as long as the piece, which is forgotten.
        before = self._empty(B, T, x_BTD.dtype, kind) if state is None else state
        S = before.keys_BHSK.shape[2]
        if T > S:
            raise ValueError(f"ChunkAttention reads a piece of {T} tokens into a state for {S}: init_state a larger T")
        ends_BT = None
        if c.boundary:
            ends_BT = functools.reduce(jnp.logical_or, (tokens.ids_BT == word for word in c.boundary))
        at, counts, stayed_B = places(pos_BT, c.chunk, S, before.counts, ends_BT, self.least)
        q_BTHK, k_BTHK, v_BTHV, ask_BTGF, told_BTGF = self._maps(x_BTD, pos_BT, at.slot_BT)
        # Rounded to the cache before use: the same numbers whether a key is read now or in a later piece.
        k_BTHK, v_BTHV = k_BTHK.astype(before.keys_BHSK.dtype), v_BTHV.astype(before.values_BHSV.dtype)
        lay_heads = jax.vmap(lay, (1, None, 2), 1)
        keys_BHSK = lay_heads(before.keys_BHSK, at.lies_BT, k_BTHK)
        values_BHSV = lay_heads(before.values_BHSV, at.lies_BT, v_BTHV)
        summary_BSF, sum_BGF = self._sum(before, told_BTGF, at, counts, stayed_B)
        end_BS = size_BN = begin_BN = None
        if before.end_BS is not None:
            end_BS = lay(before.end_BS, jnp.where((at.done_BT > 0) & (at.lies_BT < S), at.upto_BT, S), at.lies_BT + 1)
            begin_BN = jnp.pad(end_BS[:, :-1], ((0, 0), (1, 0)))
            size_BN, begin_BN = ((a[:, : S // self.least]) for a in (end_BS - begin_BN, begin_BN))
        after = ChunkState(keys_BHSK, values_BHSV, summary_BSF, end_BS, sum_BGF, counts)

        near, reach = None, c.chunk if c.weight == "union" else c.window or 0
        if reach:
            lead = 0 if state is None else reach - 1
            # Of one token what came before it can be read after it was written, which leaves the cache in place.
            cache = after if T == 1 else before
            near = _near(cache, before.counts, (k_BTHK, v_BTHV), at, lead, self._first(at))
        N = S // self.least
        summary_BNGF = summary_BSF[:, : N * self.least].reshape(B, N, -1)[..., : self.G * self.F]
        summary_BNGF = summary_BNGF.reshape(B, N, self.G, self.F).astype(kind)
        got = chunk_attention(
            q_BTHK,
            keys_BHSK,
            values_BHSV,
            ask_BTGF,
            summary_BNGF[..., : ask_BTGF.shape[-1]],
            at.from_BT,
            at.upto_BT,
            chunk=c.chunk,
            top=c.top,
            weight=c.weight,
            near=near,
            reach=reach,
            content_BNHV=summary_BNGF[..., self.K :] if c.weight == "gated" else None,
            size_BN=size_BN,
            begin_BN=begin_BN,
            implementation=c.implementation,
        )
        y_BTHV = got.selected
        if self.gate is not None:
            assert got.compressed is not None and got.near is not None
            y_BTMHV = jnp.stack([got.compressed, got.selected, got.near], 2)
            y_BTHV = jnp.sum(y_BTMHV * jax.nn.sigmoid(self.gate(x_BTD))[..., None], 2)
        elif got.near is not None:
            y_BTHV = y_BTHV + got.near
        if state is not None:
            lost_BT = (pos_BT >= 0) & (at.row_BT >= S)
            y_BTHV = jnp.where(lost_BT[:, :, None, None], jnp.asarray(jnp.nan, y_BTHV.dtype), y_BTHV)
        return Out(self.out(y_BTHV), None if state is None else after)

    def _maps(self, x_BTD: Array, pos_BT: Array, slot_BT: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Queries, keys, values; what chunks are asked, and what is told of each token for the summary of its chunk."""
        c, kind, dtype = self.config, wide(x_BTD), x_BTD.dtype
        past_BTD = lax.stop_gradient(x_BTD) if c.stop_gradient else x_BTD
        coded_BTD = past_BTD
        if c.position == "chunk":
            coded_BTD = coded_BTD + code(c.chunk - 1 - slot_BT, x_BTD.shape[-1], kind).astype(dtype)
        exact = self.summary is None  # then keys and queries also choose
        q_BTHK = self.query(x_BTD.astype(kind) if exact else x_BTD)
        k_BTHK = self.key(coded_BTD.astype(kind) if exact else coded_BTD)
        v_BTHV = self.value(coded_BTD)
        if c.position == "rope":
            q_BTHK, k_BTHK = rope(q_BTHK, pos_BT), rope(k_BTHK, pos_BT)
        if self.ask is not None and self.summary is not None:
            ask_BTGF = self.ask(x_BTD.astype(kind))[:, :, None]
            told_BTGF = self.summary(past_BTD.astype(kind))[:, :, None]
        elif c.weight == "union":
            ask_BTGF, told_BTGF = lax.stop_gradient((q_BTHK, k_BTHK))
        else:
            ask_BTGF, told_BTGF = q_BTHK, jnp.concatenate([k_BTHK, v_BTHV.astype(kind)], -1)
        return q_BTHK.astype(dtype), k_BTHK.astype(dtype), v_BTHV, ask_BTGF, told_BTGF

    def _first(self, at: Places) -> Array:
        """The number of the first token near each that it sees: of its own chunk, or of the window."""
        if self.config.window is None:
            return at.time_BT - at.slot_BT
        return jnp.maximum(at.start_BT, at.time_BT - (self.config.window - 1))

    def _sum(
        self, before: ChunkState, told_BTGF: Array, at: Places, counts: Counts, stayed_B: Array
    ) -> tuple[Array, Array]:
        """The summaries with those of the chunks that were completed, and the sum of what is unfinished now."""
        (B, S, F), R, T = before.summary_BSF.shape, self.least, told_BTGF.shape[1]
        done_B1 = (counts.count_B - before.counts.count_B)[:, None]
        most = -(-T // R)  # chunks that a piece may complete
        kept_BT = at.lies_BT < S
        size: Any = R
        if before.end_BS is None:
            room = jnp.zeros((B, (most + 1) * R, *told_BTGF.shape[2:]), before.sum_BGF.dtype)
            here_BT = jnp.where(kept_BT, at.lies_BT - before.counts.used_B[:, None], room.shape[1])
            sum_BNGF = jnp.sum(lay(room, here_BT, told_BTGF).reshape(B, most + 1, R, *told_BTGF.shape[2:]), 2)
        else:
            room = jnp.zeros((B, most + 1, *told_BTGF.shape[2:]), before.sum_BGF.dtype)
            here_BT = jnp.where(kept_BT, at.upto_BT - before.counts.count_B[:, None], most + 1)
            add = jax.vmap(lambda room_NGF, n_T, told_TGF: room_NGF.at[n_T].add(told_TGF, mode="drop"))
            sum_BNGF = add(room, here_BT, told_BTGF.astype(room.dtype))
            size_BN = lay(jnp.ones((B, most), jnp.int32), jnp.where(at.done_BT > 0, here_BT, most), at.slot_BT + 1)
            size = size_BN[..., None, None].astype(room.dtype)
        sum_BNGF = sum_BNGF.at[:, 0].add(jnp.where(stayed_B[:, None, None], before.sum_BGF, 0))
        sum_BGF = jnp.take_along_axis(sum_BNGF, done_B1[..., None, None], 1)[:, 0]

        slot_1S = jnp.arange(most * R, dtype=jnp.int32)[None]
        lies_BS = jnp.where(slot_1S < done_B1 * R, before.counts.count_B[:, None] * R + slot_1S, S)
        mean_BNF = (sum_BNGF[:, :most] / size).reshape(B, most, -1)
        mean_BNF = jnp.pad(mean_BNF, ((0, 0), (0, 0), (0, R * F - mean_BNF.shape[-1])))
        return lay(before.summary_BSF, lies_BS, mean_BNF.reshape(B, most * R, F)), sum_BGF


def _near(cache: ChunkState, counts: Counts, new: tuple[Array, Array], at: Places, lead: int, first_BT: Array) -> Near:
    """The last `lead` tokens of the document that goes on, from the cache, and then those of the piece."""
    (B, T), S = at.time_BT.shape, cache.keys_BHSK.shape[2]
    # Without padding, so that what a block of queries sees lies in a band.
    number_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    order_BT = lay(jnp.full((B, T), T, jnp.int32), jnp.where(at.time_BT < 0, T, at.time_BT), number_BT)
    k, v = (read(a, order_BT).swapaxes(1, 2) for a in new)
    if lead:
        end_B1 = (counts.used_B + counts.held_B)[:, None]
        slot_BS = jnp.clip(end_B1 - lead + jnp.arange(lead, dtype=jnp.int32)[None], 0, S - 1)
        of_heads = jax.vmap(read, (1, None), 1)
        k = jnp.concatenate([of_heads(cache.keys_BHSK, slot_BS), k], 2)
        v = jnp.concatenate([of_heads(cache.values_BHSV, slot_BS), v], 2)
    return Near(k, v, first_BT + lead, jnp.where(at.time_BT < 0, -1, at.time_BT + lead))


def code(place_BT: Array, D: int, dtype: jnp.dtype) -> Array:
    """Sines and cosines of a place in the chunk at speeds from 1 down to 1e-4, [B, T, D] (Vaswani et al. 2017)."""
    speed = 10_000.0 ** (jnp.arange(0, D, 2, dtype=dtype) * (-1.0 / D))
    angle = place_BT.astype(dtype)[..., None] * speed[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :D]

"""Softmax attention: the memory that keeps everything, or the last `window` tokens.

Vaswani et al. 2017, arXiv 1706.03762.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from layers.heads import even
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, divides, one_of, positive, take
from layers.norm import RMSNorm
from layers.ops.attention import attention
from layers.ops.rope import rope


class AttentionState(NamedTuple):
    """A ring of S slots: token number n of a row, padding not counted, lies in slot n mod S.

    Keys come normed and turned. Head-major, because a cache is read whole at every token (docs of ops.attention).
    """

    keys_BGSK: Array
    values_BGSV: Array
    key_time_BS: Array  # int32, the number of the token in each slot; -1 = empty
    time_B: Array  # int32, tokens read so far
    start_B: Array  # int32, the number of the first token of the current document


@dataclasses.dataclass(frozen=True)
class Attention(LayerConfig):
    """y = softmax(q k^T / sqrt(K)) v W_out over the tokens of the document so far, or the last `window` of them.

    H: heads. G: groups of heads that share keys and values (Ainslie et al. 2023, 2305.13245); None = H.
    K: channels of a head, for keys and values alike; None = D / H.
    window: tokens that a token sees, itself included; None = all.
    rope_theta: base of the rotary embedding of queries and keys by place in the document; None = no position at all.
    qk_norm: RMSNorm of each query and key over K, before the rotation (Dehghani et al. 2023, 2302.05442).
    gate: output gate sigmoid(x W_gate) on each channel of each head (Qiu et al. 2025, 2505.06708).
    bias: biases on queries, keys and values.
    persistent: learned tokens that every token sees, however far from its document's start (Titans, 2501.00663, section
        3.3). They have no place: queries meet them before the rotation, so that a window may be anywhere.
    cache_dtype: "float32" or "bfloat16", of the keys and values in the state.

    Parameters: D K (2 H + 2 G) [= 4 D² for G = H, K = D / H], + D H K with the gate, + 2 K with qk_norm, + K (H + 2 G)
    with biases, + D for each persistent token. State: 2 S G K numbers of `cache_dtype` and S + 2 of int32 a row, S = T
    of init_state, or min(window, T).
    """

    H: int = 4
    G: int | None = None
    K: int | None = None
    window: int | None = None
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    gate: bool = False
    bias: bool = False
    persistent: int = 0
    cache_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        positive(self, "H", "G", "K", "window", "rope_theta")
        one_of(self)
        if self.persistent < 0:
            raise ValueError(f"Attention.persistent is {self.persistent}: it must be at least 0")
        if self.G is not None:
            divides(self, "G", "H")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "AttentionLayer":
        return AttentionLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=4, G=2),
            cls(H=4, K=8, window=5, qk_norm=True, bias=True),
            cls(H=2, G=1, rope_theta=None, gate=True),
            cls(H=2, window=5, persistent=3),
        )


def empty_cache(B: int, G: int, S: int, K: int, dtype: jnp.dtype) -> AttentionState:
    return AttentionState(
        keys_BGSK=jnp.zeros((B, G, S, K), dtype),
        values_BGSV=jnp.zeros((B, G, S, K), dtype),
        key_time_BS=jnp.full((B, S), -1, jnp.int32),
        time_B=jnp.zeros(B, jnp.int32),
        start_B=jnp.zeros(B, jnp.int32),
    )


class AttentionLayer(Layer):
    def __init__(self, config: Attention, D: int, *, rngs: nnx.Rngs):
        H, G = config.H, config.G or config.H
        if config.K is None and D % H:
            raise ValueError(f"Attention.H is {H}, which does not divide D = {D}: change it, or say K")
        K = config.K or D // H
        if config.rope_theta is not None:
            even(config, K)
        self.config = config
        self.K = K
        self.query = Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, bias=config.bias, rngs=rngs)
        self.key = Einsum("BTD,DGK->BTGK", D=D, G=G, K=K, bias=config.bias, rngs=rngs)
        self.value = Einsum("BTD,DGV->BTGV", D=D, G=G, V=K, bias=config.bias, rngs=rngs)
        self.query_norm = RMSNorm(K, axes="K") if config.qk_norm else None
        self.key_norm = RMSNorm(K, axes="K") if config.qk_norm else None
        self.gate = Einsum("BTD,DHV->BTHV", D=D, H=H, V=K, rngs=rngs) if config.gate else None
        P = config.persistent
        self.persistent = nnx.Param(jax.random.normal(rngs.params(), [P, D], jnp.float32), axes="SD") if P else None
        self.out = Einsum("BTHV,HVD->BTD", D=D, H=H, V=K, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> AttentionState:
        """An empty cache.

        Without a window, or with one longer than T, it holds T tokens: a longer piece raises ValueError, and a token
        after the T-th reads NaN.
        """
        G, K, dtype = self.config.G or self.config.H, self.K, jnp.dtype(self.config.cache_dtype)
        return empty_cache(B, G, min(self.config.window or T, T), K, dtype)

    def __call__(self, x_BTD: Array, tokens: Tokens, state: AttentionState | None = None) -> Out:
        q_BTHK, (k_BTGK, v_BTGV) = self._query(x_BTD, tokens.pos_BT), self._key_value(x_BTD, tokens.pos_BT)
        attend = functools.partial(self._attend, x_BTD)
        if state is None:
            time_BT, since_BT = number(tokens.pos_BT, 0, 0)
            y_BTHV = attend(
                q_BTHK,
                k_BTGK,
                v_BTGV,
                query_time=time_BT,
                key_time=time_BT,
                since=since_BT,
                window=self.config.window,
                ordered=True,
            )
        else:
            y_BTHV, state = remember(attend, q_BTHK, k_BTGK, v_BTGV, tokens.pos_BT, state, self.config.window)
        return Out(self._write(y_BTHV, x_BTD), state)

    def read(self, x_BTD: Array, tokens: Tokens, at_BN: Array) -> Out:
        x_BND = take(x_BTD, at_BN)
        k_BTGK, v_BTGV = self._key_value(x_BTD, tokens.pos_BT)
        time_BT, since_BT = number(tokens.pos_BT, 0, 0)
        y_BNHV = self._attend(
            x_BND,
            self._query(x_BND, take(tokens.pos_BT, at_BN)),
            k_BTGK,
            v_BTGV,
            query_time=take(time_BT, at_BN),
            key_time=time_BT,
            since=take(since_BT, at_BN),
            window=self.config.window,
        )
        return Out(self._write(y_BNHV, x_BND), None)

    def _attend(self, x_BTD: Array, q_BTHK: Array, k: Array, v: Array, **times: Any) -> Array:
        """Attention over the tokens, and over the persistent ones."""
        if self.persistent is None:
            return attention(q_BTHK, k, v, **times)
        p_BPD = jnp.broadcast_to(self.persistent[...].astype(x_BTD.dtype)[None], (len(x_BTD), *self.persistent.shape))
        free, known = self._place(self.query(x_BTD), self.query_norm, None), self._key_value(p_BPD, None)
        return attention(q_BTHK, k, v, always=(free, *known), **times)

    def _query(self, x_BTD: Array, pos_BT: Array) -> Array:
        return self._place(self.query(x_BTD), self.query_norm, pos_BT)

    def _key_value(self, x_BTD: Array, pos_BT: Array | None) -> tuple[Array, Array]:
        return self._place(self.key(x_BTD), self.key_norm, pos_BT), self.value(x_BTD)

    def _place(self, x_BTHK: Array, norm: RMSNorm | None, pos_BT: Array | None) -> Array:
        """Queries or keys, normed and turned by their place, if they have one."""
        x_BTHK = x_BTHK if norm is None else norm(x_BTHK)
        theta = self.config.rope_theta
        return x_BTHK if theta is None or pos_BT is None else rope(x_BTHK, pos_BT, theta)

    def _write(self, y_BTHV: Array, x_BTD: Array) -> Array:
        """What goes to the residual stream."""
        if self.gate is not None:
            y_BTHV = y_BTHV * jax.nn.sigmoid(self.gate(x_BTD))
        return self.out(y_BTHV)


def number(pos_BT: Array, time_B1: Array | int, start_B1: Array | int) -> tuple[Array, Array]:
    """Numbers of the tokens (-1 for padding) and, for each, the number of the first token of its document."""
    valid_BT = pos_BT >= 0
    time_BT = jnp.where(valid_BT, jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1 + time_B1, -1)
    since_BT = lax.cummax(jnp.where(pos_BT == 0, time_BT, start_B1), axis=1)
    return time_BT, since_BT


def remember(
    attend: Callable[..., Array],
    q_BTHK: Array,
    k_BTGK: Array,
    v_BTGV: Array,
    pos_BT: Array,
    state: AttentionState,
    window: int | None,
) -> tuple[Array, AttentionState]:
    """Attention over the cache and the new tokens, which it writes to the cache."""
    T, S = pos_BT.shape[1], state.key_time_BS.shape[1]
    # A ring as long as its window forgets only what is out of sight; any other must never come round.
    bounded = S == window
    if not bounded and T > S:
        raise ValueError(f"Attention reads a piece of {T} tokens into a state for {S}: say a larger T to init_state")
    time_BT, since_BT = number(pos_BT, state.time_B[:, None], state.start_B[:, None])
    end_B = state.time_B + jnp.sum(pos_BT >= 0, axis=1, dtype=jnp.int32)
    # Rounded to the cache before use: the same numbers whether a key is read now or in a later piece.
    k_BGTK = k_BTGK.astype(state.keys_BGSK.dtype).swapaxes(1, 2)
    v_BGTV = v_BTGV.astype(state.values_BGSV.dtype).swapaxes(1, 2)

    after = AttentionState(*_store(state, k_BGTK, v_BGTV, time_BT, end_B), end_B, since_BT[:, -1])
    if bounded and T > 1:
        # The piece may write over what its own first tokens see.
        k_BGSK = jnp.concatenate([state.keys_BGSK, k_BGTK], axis=2)
        v_BGSV = jnp.concatenate([state.values_BGSV, v_BGTV], axis=2)
        key_time_BS = jnp.concatenate([state.key_time_BS, time_BT], axis=1)
    else:
        k_BGSK, v_BGSV, key_time_BS = after.keys_BGSK, after.values_BGSV, after.key_time_BS
    y_BTHV = attend(
        q_BTHK,
        k_BGSK,
        v_BGSV,
        query_time=time_BT,
        key_time=key_time_BS,
        since=since_BT,
        window=window,
        head_major=True,
    )
    if not bounded:
        y_BTHV = jnp.where((time_BT >= S)[:, :, None, None], jnp.asarray(jnp.nan, y_BTHV.dtype), y_BTHV)
    return y_BTHV, after


def _store(
    state: AttentionState, k_BGTK: Array, v_BGTV: Array, time_BT: Array, end_B: Array
) -> tuple[Array, Array, Array]:
    """The three rings with the last S of the new tokens in their slots; padding is dropped."""
    S = state.key_time_BS.shape[1]
    kept_BT = (time_BT >= 0) & (time_BT >= end_B[:, None] - S)
    slot_BT = jnp.where(kept_BT, time_BT % S, S)  # S is no slot
    if time_BT.shape[1] == 1:
        # XLA on CPU turns a single write into an operation that it fuses with the read, for which it copies the cache
        # (measured: 7 times slower at B = 1). With a second write, to no slot, it stays in place.
        slot_BT = jnp.pad(slot_BT, ((0, 0), (0, 1)), constant_values=S)
        k_BGTK, v_BGTV = (jnp.pad(a, ((0, 0), (0, 0), (0, 1), (0, 0))) for a in (k_BGTK, v_BGTV))
        time_BT = jnp.pad(time_BT, ((0, 0), (0, 1)))
    put = jax.vmap(lambda ring, new, slot_T: ring.at[:, slot_T].set(new, mode="drop"))
    put_time = jax.vmap(lambda ring_S, new_T, slot_T: ring_S.at[slot_T].set(new_T, mode="drop"))
    return (
        put(state.keys_BGSK, k_BGTK, slot_BT),
        put(state.values_BGSV, v_BGTV, slot_BT),
        put_time(state.key_time_BS, time_BT, slot_BT),
    )

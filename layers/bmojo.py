"""B'MOJO-F (Zancato et al. 2024, arXiv 2407.06324): a window of attention, continued by what a recurrence made of it.

    F = recurrent(x)
    y_i = softmax over both sets at once of q_i·k / sqrt(K), times v:
          keys and values of x_j for j in [i - w + 1, i], and of F_j for j in [i - 2 w + 1, i - w]

q comes from x. A token reads the w tokens up to itself as they are, and the w before those through what the recurrence
knew there, which is all that came earlier: an attention of span 2 w with a memory that fades at its end.

Fast form: F_j counted w places later falls in [i - w + 1, i] too, so that both sets are one window over twice as many
keys. Documents are numbered 2 w apart, so that nothing of an earlier one is ever in sight.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from layers.gated_deltanet import GatedDeltaNet
from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, divides, one_of, positive
from layers.norm import RMSNorm
from layers.ops.attention import attention
from layers.ops.precision import HIGHEST, wide
from layers.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class BMojoFading(LayerConfig):
    """recurrent: any layer; F is its output, of width D, as it comes (no norm in between).

    H: heads. G: groups of heads that share keys and values; None: H. K: channels of a head; None: D / H.
    window: w, tokens of each of the two sets.
    tied: one map to keys and one to values for both sets; else F has its own.
    rope_theta: base of the rotary embedding, of x_j and F_j alike by the place of j; None: no positions.
    qk_norm: RMSNorm of each query and key over K, before the rotation.
    implementation: "naive": the definition, a table of all queries by all keys. "chunked": blocks of them, and only
        those that meet. "auto": naive where there are few.

    Parameters: those of `recurrent` + 2 D K (H + G), + 2 D K G untied, + 2 K with qk_norm (3 K untied). State of a row:
    that of `recurrent`, 6 w G K numbers and 3 w + 1 of int32: w entries of x, and of F the 2 w that are or will be
    seen.
    """

    recurrent: LayerConfig = GatedDeltaNet()
    H: int = 4
    G: int | None = None
    K: int | None = None
    window: int = 2048
    tied: bool = True
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    implementation: Literal["auto", "naive", "chunked"] = "auto"

    def __post_init__(self):
        positive(self, "H", "G", "K", "window", "rope_theta")
        one_of(self)
        if self.G is not None:
            divides(self, "G", "H")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "BMojoFadingLayer":
        return BMojoFadingLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        recurrent = GatedDeltaNet(H=2, K=6, V=8, chunk=8)
        return (
            cls(recurrent, H=2, K=8, window=6),
            cls(recurrent, H=4, G=2, K=8, window=6, tied=False, qk_norm=True, implementation="chunked"),
        )


class Entries(NamedTuple):
    """Keys, normed and turned, values, and the numbers of their tokens: int32, negative for none."""

    keys_BGSK: Array
    values_BGSV: Array
    time_BS: Array


TIME = (2, 2, 1)  # the axis of time of each


class BMojoFadingState(NamedTuple):
    """rings: token number n in slot n mod w for x, and in slot w + n mod 2 w for F. time_B: int32, the next number."""

    rings: Entries
    time_B: Array
    recurrent: Any


class BMojoFadingLayer(Layer):
    def __init__(self, config: BMojoFading, D: int, *, rngs: nnx.Rngs):
        H, K = config.H, head_size(config, "K", D)
        if config.rope_theta is not None:
            even(config, K)
        self.config, self.K, self.G = config, K, config.G or H
        self.recurrent = config.recurrent.build(D, rngs=rngs)
        linear = partial(Einsum, D=D, H=H, G=self.G, K=K, V=K, rngs=rngs)
        self.query, self.key, self.value = linear("BTD,DHK->BTHK"), linear("BTD,DGK->BTGK"), linear("BTD,DGV->BTGV")
        self.fading_key = None if config.tied else linear("BTD,DGK->BTGK")
        self.fading_value = None if config.tied else linear("BTD,DGV->BTGV")
        self.query_norm = RMSNorm(K, axes="K") if config.qk_norm else None
        self.key_norm = RMSNorm(K, axes="K") if config.qk_norm else None
        self.fading_norm = RMSNorm(K, axes="K") if config.qk_norm and not config.tied else None
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> BMojoFadingState:
        shape = (B, self.G, 3 * self.config.window, self.K)
        keys, values = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        rings = Entries(keys, values, jnp.full((B, shape[2]), -1, jnp.int32))
        return BMojoFadingState(rings, jnp.zeros(B, jnp.int32), self.recurrent.init_state(B, T))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: BMojoFadingState | None = None) -> Out:
        w, pos_BT = self.config.window, tokens.pos_BT
        held = self.recurrent(x_BTD, tokens, None if state is None else state.recurrent)
        q_BTHK = self._place(self.query(x_BTD), self.query_norm, pos_BT)
        time_BT, end_B = _number(pos_BT, 0 if state is None else state.time_B[:, None], w)
        new = self._entries(x_BTD, held.y_BTD, pos_BT, time_BT)
        if state is None:
            return Out(self.out(self._attend(q_BTHK, time_BT, None, new)), None, held.aux)
        # Rounded to the rings before use: the same numbers whether a key is read now or in a later piece.
        recent, fading = (
            Entries(*(a.astype(ring.dtype) for a, ring in zip(part, state.rings, strict=True))) for part in new
        )
        rings = _store(state.rings, recent, fading, end_B, w)
        if pos_BT.shape[1] == 1:
            y_BTHV = self._attend(q_BTHK, time_BT, rings, None)
        else:  # the piece may write over what its own first tokens see
            y_BTHV = self._attend(q_BTHK, time_BT, state.rings, (recent, fading))
        after = BMojoFadingState(*_recount(rings, end_B, w), held.state)
        return Out(self.out(y_BTHV), after, held.aux)

    def _place(self, x_BTHK: Array, norm: RMSNorm | None, pos_BT: Array) -> Array:
        """Queries or keys, normed and turned by their place."""
        x_BTHK, theta = x_BTHK if norm is None else norm(x_BTHK), self.config.rope_theta
        return x_BTHK if theta is None else rope(x_BTHK, pos_BT, theta)

    def _entries(self, x_BTD: Array, f_BTD: Array, pos_BT: Array, time_BT: Array) -> tuple[Entries, Entries]:
        """Of x and of F."""

        def tell(a_BTD: Array, key: Einsum, value: Einsum, norm: RMSNorm | None) -> Entries:
            k_BTGK = self._place(key(a_BTD), norm, pos_BT)
            return Entries(k_BTGK.swapaxes(1, 2), value(a_BTD).swapaxes(1, 2), time_BT)

        recent = tell(x_BTD, self.key, self.value, self.key_norm)
        if self.fading_key is None or self.fading_value is None:
            return recent, tell(f_BTD, self.key, self.value, self.key_norm)
        return recent, tell(f_BTD, self.fading_key, self.fading_value, self.fading_norm)

    def _attend(
        self, q_BTHK: Array, time_BT: Array, rings: Entries | None, new: tuple[Entries, Entries] | None
    ) -> Array:
        """Attention over what the rings hold and what is new, or one of the two."""
        how, w = self.config.implementation, self.config.window
        ring_S = np.arange(3 * w) >= w  # which slots are of F
        parts = [] if rings is None else [rings]
        if how == "naive":
            T = time_BT.shape[1]
            late_S = np.concatenate([*([ring_S] if parts else []), *([np.repeat([False, True], T)] if new else [])])
            return definition(q_BTHK, _join(*parts, *(new or ())), time_BT, late_S, w)
        parts = [_later(part, w * ring_S) for part in parts]
        if new is not None:
            parts.append(_weave(new[0], _later(new[1], w), w))
        k, v, key_time_BS = _join(*parts)
        return attention(
            q_BTHK,
            k,
            v,
            query_time=time_BT,
            key_time=key_time_BS,
            window=w,
            head_major=True,
            implementation="blocks" if how == "chunked" else "auto",
        )


def definition(q_BTHK: Array, entries: Entries, time_BT: Array, late_S: np.ndarray, w: int) -> Array:
    """y_BTHV, 0 for padding. late_S: which entries are of F: seen w to 2 w - 1 tokens later, the others 0 to w - 1."""
    B, T, H, K = q_BTHK.shape
    k_BGSK, v_BGSV, key_time_BS = entries
    G, dtype = k_BGSK.shape[1], wide(q_BTHK, k_BGSK)
    q, k, v = q_BTHK.reshape(B, T, G, H // G, K).astype(dtype), k_BGSK.astype(dtype), v_BGSV.astype(dtype)
    ago_BTS = time_BT[:, :, None] - key_time_BS[:, None]
    first_S = jnp.asarray(w * late_S, jnp.int32)[None, None]
    visible_BTS = (first_S <= ago_BTS) & (ago_BTS < first_S + w) & (key_time_BS >= 0)[:, None]
    s_BGhTS = jnp.einsum("BTGhK,BGSK->BGhTS", q, k, precision=HIGHEST) * K**-0.5
    visible_BTS &= (time_BT >= 0)[..., None]
    s_BGhTS = jnp.where(visible_BTS[:, None, None], s_BGhTS, -jnp.inf)
    # A finite maximum, and a sum above 0: padding sees nothing, and its exp(-inf) must be 0 and not NaN.
    p_BGhTS = jnp.exp(s_BGhTS - lax.stop_gradient(jnp.maximum(s_BGhTS.max(-1, keepdims=True), jnp.finfo(dtype).min)))
    total_BGhT1 = jnp.maximum(p_BGhTS.sum(-1, keepdims=True), jnp.finfo(dtype).tiny)
    y_BTGhV = jnp.einsum("BGhTS,BGSV->BTGhV", p_BGhTS / total_BGhT1, v, precision=HIGHEST)
    return y_BTGhV.reshape(B, T, H, v.shape[-1]).astype(q_BTHK.dtype)


def _number(pos_BT: Array, time_B1: Array | int, w: int) -> tuple[Array, Array]:
    """Numbers of the tokens, -1 for padding, a document's first 2 w after the last of the one before; and the next."""
    step_BT = (pos_BT >= 0).astype(jnp.int32) + jnp.where(pos_BT == 0, 2 * w, 0)
    next_BT = time_B1 + jnp.cumsum(step_BT, 1, dtype=jnp.int32)
    return jnp.where(pos_BT >= 0, next_BT - 1, -1), next_BT[:, -1]


def _recount(rings: Entries, time_B: Array, w: int) -> tuple[Entries, Array]:
    """The same with smaller numbers, so that they stay small: by whole turns of the rings, and nothing seen below 0."""
    less_B = jnp.maximum(time_B // (2 * w) - 2, 0) * (2 * w)
    return rings._replace(time_BS=jnp.maximum(rings.time_BS - less_B[:, None], -1)), time_B - less_B


def _later(entries: Entries, delay: Any) -> Entries:
    delay_1S = jnp.asarray(delay, jnp.int32).reshape(1, -1)
    return entries._replace(time_BS=jnp.where(entries.time_BS >= 0, entries.time_BS + delay_1S, -1))


def _join(*parts: Entries) -> Entries:
    return Entries(*(jnp.concatenate(arrays, axis) for *arrays, axis in zip(*parts, TIME, strict=True)))


def _weave(recent: Entries, fading: Entries, w: int) -> Entries:
    """x_0 F_-w x_1 F_1-w ...: what is seen together lies together, and no block of queries meets many of keys.

    The last w of F, which none of these queries can see, are left out.
    """
    T = recent.time_BS.shape[1]
    if T <= w:
        return recent

    def weave(a: Array, b: Array, axis: int) -> Array:
        b = lax.slice_in_dim(b, 0, T - w, axis=axis)
        b = jnp.pad(b, [(w, 0) if i == axis else (0, 0) for i in range(b.ndim)], constant_values=-1)
        return jnp.stack([a, b], axis + 1).reshape(*a.shape[:axis], 2 * T, *a.shape[axis + 1 :])

    return Entries(*(weave(a, b, axis) for a, b, axis in zip(recent, fading, TIME, strict=True)))


def _store(rings: Entries, recent: Entries, fading: Entries, end_B: Array, w: int) -> Entries:
    """The rings with the last w of x and the last 2 w of F in their slots; padding is dropped."""
    time_BT, kept_B1 = recent.time_BS, end_B[:, None]
    slots = []
    for base, size in ((0, w), (w, 2 * w)):
        kept_BT = (time_BT >= 0) & (time_BT >= kept_B1 - size)
        slots.append(jnp.where(kept_BT, base + time_BT % size, 3 * w))  # which is no slot
    slot_BS = jnp.concatenate(slots, 1)
    new = _join(recent, fading)
    put = jax.vmap(lambda ring, new, slot_S: ring.at[:, slot_S].set(new, mode="drop"))
    return Entries(
        put(rings.keys_BGSK, new.keys_BGSK, slot_BS),
        put(rings.values_BGSV, new.values_BGSV, slot_BS),
        put(rings.time_BS[:, None], new.time_BS[:, None], slot_BS)[:, 0],
    )

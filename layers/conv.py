"""Short causal convolution, one filter a channel: each token sees the few inputs just before it, itself included.

    y_t = sum_j w_j x_{t - j δ} + b,  j = 0 .. J-1        (J taps, dilation δ)

Recurrent memories put one behind the query, key and value projections (H3, arXiv 2212.14052; Mamba; DeltaNet). Shifted
multiply-adds, because XLA fuses them into one loop; a grouped lax.conv is many times slower on CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.ops.precision import wide
from layers.ops.sequence import by_pieces, hand_on, in_pieces

Streams = tuple[Array, ...]
Tails = tuple[Array, ...]


class ShortConv(nnx.Module):
    """`ShortConv("HK", H=4, K=16, rngs=rngs)` filters [B, T, H, K] over T, `ShortConv("D", D=64, rngs=rngs)` [B, T, D].

    Weights U(±1/sqrt(taps)), or zeros; biases zeros. `activation` follows, still in float32. The tail that is handed on
    holds the last (taps - 1) · dilation inputs of the current document, zeros where it is younger; a start in between
    hides what lies before.
    """

    def __init__(
        self,
        axes: str,
        *,
        rngs: nnx.Rngs,
        taps: int = 4,
        dilation: int = 1,
        zeros: bool = False,
        bias: bool = False,
        activation: Callable[[Array], Array] | None = None,
        **sizes: int,
    ):
        shape = [sizes[a] for a in axes]
        bound = 0.0 if zeros else taps**-0.5
        self.taps, self.dilation, self.axes, self.channels = taps, dilation, axes, tuple(shape)
        self.activation = activation
        w = jax.random.uniform(rngs.params(), [taps, *shape], jnp.float32, -bound, bound)
        self.w = nnx.Param(w, axes="J" + axes)
        self.b = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, decay=False) if bias else None

    def init_tail(self, B: int) -> Array:
        """No input yet: float32 [B, (taps - 1) · dilation, *channels]."""
        return jnp.zeros([B, (self.taps - 1) * self.dilation, *self.channels], jnp.float32)

    def __call__(self, x: Array, pos_BT: Array, tail: Array | None = None) -> tuple[Array, Array]:
        """x: [B, T, *channels]. Returns (y like x, the tail after the last token in the dtype of `tail`).

        Padding (pos < 0) is skipped wherever it stands; y is unspecified there.
        """
        tail = self.init_tail(x.shape[0]) if tail is None else tail
        dtype = wide(x)
        w = self.w[...].astype(dtype)
        arrays = x.astype(dtype), w, pos_BT, tail.astype(dtype)
        if in_pieces(x.shape[1]):
            y, new_tail = _in_pieces(*arrays, self.dilation, self.axes)
        else:
            y, new_tail = (_step if x.shape[1] == 1 else _convolve)(*arrays, self.dilation)
        if self.b is not None:
            y = y + self.b[...].astype(dtype)[None, None]
        if self.activation is not None:
            y = self.activation(y)
        return y.astype(x.dtype), new_tail.astype(tail.dtype)


def _over(mask: Array, x: Array) -> Array:
    """The mask with as many axes as x, aligned with its first ones."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _step(x: Array, w: Array, pos_BT: Array, tail: Array, dilation: int) -> tuple[Array, Array]:
    """One token: cheap enough to decode with."""
    seen = jnp.concatenate([jnp.where(_over(pos_BT[:, 0] == 0, tail), 0.0, tail), x], 1)
    y = jnp.sum(seen[:, ::dilation] * jnp.flip(w, 0)[None], 1, keepdims=True)
    return y, jnp.where(_over(pos_BT[:, 0] < 0, tail), tail, seen[:, 1:])


def _convolve(x: Array, w: Array, pos_BT: Array, tail: Array, dilation: int) -> tuple[Array, Array]:
    """A block of tokens. Only a document that goes on behind padding needs the padding moved out of its way."""
    padding_BT = pos_BT < 0
    goes_on = jnp.any(padding_BT[:, :-1] & (pos_BT[:, 1:] > 0))

    def pack(x: Array, pos_BT: Array) -> tuple[Array, Array]:
        order_BT = jnp.argsort(padding_BT, axis=1, stable=True)
        return jnp.take_along_axis(x, _over(order_BT, x), 1), jnp.take_along_axis(pos_BT, order_BT, 1)

    def unpack(y: Array) -> Array:
        order_BT = jnp.argsort(jnp.argsort(padding_BT, axis=1, stable=True), axis=1)
        return jnp.take_along_axis(y, _over(order_BT, y), 1)

    # Two small conditionals around one convolution, not one around two: a conditional keeps for the backward pass what
    # either branch would need, and here that is only the order.
    x, pos_BT = jax.lax.cond(goes_on, pack, lambda x, pos: (x, pos), x, pos_BT)
    y, tail = _convolve_packed(x, w, pos_BT, tail, dilation)
    return jax.lax.cond(goes_on, unpack, lambda y: y, y), tail


def _convolve_packed(x: Array, w: Array, pos_BT: Array, tail: Array, dilation: int) -> tuple[Array, Array]:
    """As _convolve, where no document goes on behind padding."""
    (B, T), J = pos_BT.shape, tail.shape[1] + 1
    seen = jnp.concatenate([tail, x], 1)
    start_BT = jnp.pad(pos_BT == 0, [(0, 0), (J - 1, 0)])
    y = x * w[0][None, None]
    hidden_BT = jnp.zeros([B, T], bool)
    for j in range(1, J):  # what lies j back is hidden where a document started at the token or up to j - 1 before it
        hidden_BT = hidden_BT | start_BT[:, J - j : J - j + T]
        if j % dilation == 0:
            seen_BT = seen[:, J - 1 - j : J - 1 - j + T]
            y = y + jnp.where(_over(hidden_BT, x), 0.0, seen_BT) * w[j // dilation][None, None]

    # The last J - 1 inputs up to the last token that is not padding (none: the tail stays), without those from before
    # the start of its document.
    index_T = jnp.arange(T)[None]
    last_B = jnp.max(jnp.where(pos_BT >= 0, index_T, -1), 1)
    started_B = jnp.max(jnp.where(pos_BT == 0, index_T, -J), 1)
    kept_BJ = last_B[:, None] + jnp.arange(1, J)[None]
    tail = jnp.take_along_axis(seen, _over(kept_BJ, seen), 1)
    return y, jnp.where(_over(kept_BJ - (J - 1) >= started_B[:, None], tail), tail, 0.0)


def _in_pieces(x: Array, w: Array, pos_BT: Array, tail: Array, dilation: int, axes: str) -> tuple[Array, Array]:
    """As _convolve, of tokens over devices: the ends of pieces are sent."""

    def piece(x: Array, w: Array, pos_BT: Array, tail: Array) -> tuple[Array, Array]:
        _, own = _convolve(x, w, pos_BT, jnp.zeros_like(tail), dilation)
        starts_B = jnp.any(pos_BT == 0, 1)
        reads_B = jnp.where(starts_B, tail.shape[1], jnp.sum(pos_BT >= 0, 1))  # a start: nothing before it is left
        before, last = hand_on((own, reads_B), _shift_in, tail)
        return _convolve(x, w, pos_BT, before, dilation)[0], last

    arguments = {"x": ("BT" + axes, x), "w": ("J" + axes, w), "pos_BT": ("BT", pos_BT), "tail": ("BJ" + axes, tail)}
    return by_pieces(piece, arguments, [("BT" + axes, x.shape), ("BJ" + axes, tail.shape)])


def _shift_in(does: tuple[Array, Array], tail: Array) -> Array:
    """The tail after a piece: its own last inputs, behind those from before it that so few tokens left in sight."""
    (own, reads_B), J = does, tail.shape[1]
    at_BJ = jnp.arange(J)[None] + jnp.minimum(reads_B, J)[:, None]
    moved = jnp.take_along_axis(tail, _over(jnp.minimum(at_BJ, J - 1), tail), 1)
    return jnp.where(_over(at_BJ >= J, tail), own, moved)


class ShortConvs(nnx.Module):
    """A ShortConv for each of several streams, e.g. `ShortConvs("HK", "HK", "HV", taps=4, ...)` for query, key, value.

    taps 0: none. The activation is applied all the same.
    """

    def __init__(
        self,
        *axes: str,
        rngs: nnx.Rngs,
        taps: int = 4,
        bias: bool = False,
        activation: Callable[[Array], Array] | None = None,
        **sizes: int,
    ):
        self.convs = nnx.List(
            [
                ShortConv(a, rngs=rngs, taps=taps, bias=bias, activation=activation, **sizes)  # type: ignore[arg-type]
                for a in axes
                if taps
            ]
        )
        self.activation = activation

    def init_tails(self, B: int) -> Tails:
        return tuple(conv.init_tail(B) for conv in self.convs)

    def __call__(self, xs: Streams, pos_BT: Array, tails: Tails | None = None) -> tuple[Streams, Tails]:
        """Streams [B, T, *channels], one for each axes given; returns them filtered, and the new tails."""
        if not self.convs:
            return tuple(xs if self.activation is None else (self.activation(x) for x in xs)), ()
        outs = [conv(x, pos_BT, tail) for conv, x, tail in zip(self.convs, xs, tails or [None] * len(xs), strict=True)]
        return tuple(y for y, _ in outs), tuple(tail for _, tail in outs)


def check_taps(config: Any) -> None:
    """Raises ValueError unless `config.conv` is 0 (none) or a width of at least 2. For `__post_init__`."""
    if config.conv < 0 or config.conv == 1:
        raise ValueError(f"{type(config).__name__}.conv is {config.conv}: it must be 0 (no convolution) or at least 2")

"""Hyper-connections (Zhu et al. 2024, arXiv 2409.19606): a residual stream of G copies, and how a layer meets them.

    z = sum_g read_g x_g        x_g <- sum_h keep_gh x_h + write_g layer(norm(z))

A layer still reads and writes one stream. What it reads, what each stream keeps of all of them and how much of the
answer is written to each are a few numbers, learned and changed a little by the streams themselves:

    mhc: read = σ(a), write = 2 σ(b), keep = Sinkhorn(exp(c)),  (a, b, c) = scale · (norm(x_1 .. x_G) W) + bias
    hc:  (read_g, write_g, keep_1g .. keep_Gg) = scale · tanh(norm(x_g) W) + bias

"mhc" holds streams together (Xie et al. 2025, arXiv 2512.24880, eq. 3, 7-9): rows and columns of keep sum to one, and
so do those of a product of many, so that depth neither swells the streams nor drains them. "hc" is free (2409.19606,
eq. 2, 10-14).

Both start as the ordinary network: W is zero, each layer writes 1 to each stream, and streams that are equal stay so.
They part because layer k prefers stream k mod G: "hc" reads that one alone (eq. 14), "mhc", whose paper is silent, that
one by half and the mean of all by half.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import take
from layers.ops.precision import wide

Hyper = Literal["mhc", "hc"]

SCALE = 0.01  # of what the streams add to the learned numbers, at first (2512.24880, table 5; "small" in 2409.19606)
TURNS = 20  # of Sinkhorn's (2512.24880, section 4.2)
KEPT = 6.0  # log of how much more of itself a stream of "mhc" keeps than of another, at first: 99% of four


class Paths(NamedTuple):
    """What a layer reads of each stream, writes to each, and what stream g keeps of stream h; at least float32."""

    read_BTG: Array
    write_BTG: Array
    keep_BTGG: Array

    def at(self, at_BN: Array) -> "Paths":
        return Paths(*(take(a, at_BN) for a in self))


class HyperConnection(nnx.Module):
    """Of the k-th layer of a model of width D (`k` may be traced: the repeats of a stage are built by vmap).

    w: [G D, 2 G + G²] of "mhc", [D, 2 + G] of "hc". bias: G numbers to read, G to write, then keep, row by row.
    """

    def __init__(self, G: int, D: int, k: int | Array, hyper: Hyper, *, eps: float):
        self.hyper, self.eps = hyper, eps
        first, own = jax.nn.one_hot(jnp.asarray(k) % G, G), jnp.eye(G)
        if hyper == "mhc":
            shape, share = (G * D, G * (2 + G)), first / 2 + 1 / (2 * G)
            read, write, keep = jnp.log(share / (1 - share)), jnp.zeros(G), KEPT * own
        else:
            shape = D, 2 + G
            read, write, keep = first, jnp.ones(G), own
        self.w = nnx.Param(jnp.zeros(shape, jnp.float32), axes="DP", fan_in="D")
        bias = jnp.concatenate([read, write, keep.reshape(-1)]).astype(jnp.float32)
        self.bias = nnx.Param(bias, axes="P", decay=False)
        self.read_scale, self.write_scale, self.keep_scale = (
            nnx.Param(jnp.full([], SCALE, jnp.float32), axes="", decay=False) for _ in range(3)
        )

    def __call__(self, x_BTGD: Array) -> tuple[Array, Paths]:
        """(what the layer reads, [B, T, D] in the dtype of x; the paths, which `write` asks for)."""
        paths = self.paths(x_BTGD)
        return _mix(paths.read_BTG[:, :, None], x_BTGD)[:, :, 0].astype(x_BTGD.dtype), paths

    def paths(self, x_BTGD: Array) -> Paths:
        (B, T, G, D), dtype = x_BTGD.shape, wide(x_BTGD)
        x = x_BTGD.reshape(B, T, 1, G * D) if self.hyper == "mhc" else x_BTGD
        # The norm is divided out behind the product, which then reads the streams as they lie (2512.24880, 4.3.1).
        said = jnp.einsum("BTGD,DP->BTGP", x, self.w[...].astype(x.dtype), preferred_element_type=dtype)
        said = said * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(dtype)), -1, keepdims=True) + self.eps)
        if self.hyper == "mhc":
            read, write, keep = jnp.split(said[:, :, 0], [G, 2 * G], -1)
            keep = keep.reshape(B, T, G, G)
        else:
            said = jnp.tanh(said)
            read, write, keep = said[..., 0], said[..., 1], jnp.swapaxes(said[..., 2:], 2, 3)
        bias = self.bias[...].astype(dtype)[None, None]
        read = self.read_scale[...].astype(dtype) * read + bias[..., :G]
        write = self.write_scale[...].astype(dtype) * write + bias[..., G : 2 * G]
        keep = self.keep_scale[...].astype(dtype) * keep + bias[..., 2 * G :].reshape(1, 1, G, G)
        if self.hyper == "hc":
            return Paths(read, write, keep)
        return Paths(jax.nn.sigmoid(read), 2 * jax.nn.sigmoid(write), sinkhorn(keep))


def write(x_BTGD: Array, y_BTD: Array, paths: Paths) -> Array:
    """The streams after a layer that said y."""
    y_BT1D = y_BTD[:, :, None].astype(paths.write_BTG.dtype)
    return (_mix(paths.keep_BTGG, x_BTGD) + paths.write_BTG[..., None] * y_BT1D).astype(x_BTGD.dtype)


@jax.custom_vjp
def _mix(weight_BTGG: Array, x_BTGD: Array) -> Array:
    """sum_h weight_gh x_h in the dtype of the weights. As products of matrices, these would be too small to be fast.

    The backward pass is the same sum with weights turned round; what JAX makes of it takes two to four times as long.
    """
    x = x_BTGD.astype(weight_BTGG.dtype)
    first, *rest = (weight_BTGG[..., h : h + 1] * x[:, :, h : h + 1] for h in range(x.shape[2]))
    return sum(rest, start=first)


def _mix_forward(weight_BTGG: Array, x_BTGD: Array) -> tuple[Array, tuple[Array, Array]]:
    return _mix(weight_BTGG, x_BTGD), (weight_BTGG, x_BTGD)


def _mix_backward(kept: tuple[Array, Array], dy_BTGD: Array) -> tuple[Array, Array]:
    weight_BTGG, x_BTGD = kept
    dx_BTGD = _mix(jnp.swapaxes(weight_BTGG, 2, 3), dy_BTGD).astype(x_BTGD.dtype)
    return jnp.einsum("BTGD,BTHD->BTGH", dy_BTGD, x_BTGD.astype(dy_BTGD.dtype)), dx_BTGD


_mix.defvjp(_mix_forward, _mix_backward)


@jax.checkpoint  # the turns are cheaper done again than kept
def sinkhorn(logits_BTGG: Array) -> Array:
    """exp(logits), its columns and then its rows scaled to sum to 1, again and again (Sinkhorn & Knopp 1967).

    Rows come last, so that theirs are exact. The first turn is taken in logarithms: from then on every sum is between
    1 / G and G, whatever the logits.
    """
    logits_GGBT = jnp.moveaxis(logits_BTGG, (2, 3), (0, 1))  # few rows and columns, many tokens: sums of whole vectors

    def turn(m: Array, _: None) -> tuple[Array, None]:
        m = m / jnp.sum(m, 0, keepdims=True)
        return m / jnp.sum(m, 1, keepdims=True), None

    first = jax.nn.softmax(jax.nn.log_softmax(logits_GGBT, 0), 1)
    m_GGBT, _ = jax.lax.scan(turn, first, None, length=TURNS - 1)
    return jnp.moveaxis(m_GGBT, (0, 1), (2, 3))

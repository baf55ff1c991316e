"""The contract every layer keeps, and the alphabet it is written in.

    B batch · T time · D width · H heads · G key/value head groups, residual streams · K key · V value · F hidden
    W words · N chunks · C chunk · J taps of a convolution · M memories · S slots · R low rank · L layers
    P paths between residual streams

One letter, one meaning: in names (`x_BTD`), in einsums, in fan-in and initialisers, in the axes that each Param
carries and so in the rules of the mesh (training/layout.py).
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.fields import above_zero as above_zero
from layers.fields import divides as divides
from layers.fields import one_of as one_of
from layers.fields import positive as positive
from layers.ops.place import place


class Tokens(NamedTuple):
    """All that a layer may know of its tokens besides the residual stream.

    ids_BT: int32, entries of the vocabulary.
    pos_BT: int32, place within the document. At 0 every memory forgets what came before; a negative place marks
        padding: such a token changes no memory and is seen by nothing.
    """

    ids_BT: Array
    pos_BT: Array


class Out(NamedTuple):
    """What a layer says.

    y_BTD: the output, in the dtype of the input.
    state: structure, shapes and dtypes as they came; None for None.
    aux: named arrays. `loss/...` scalars join the objective; `rows/NAME`, int32, are the rows that were looked up in
        the table NAME, a Param of the layer (layers/ops/tables.py); metrics and probes read the rest.
    """

    y_BTD: Array
    state: Any
    aux: dict[str, Array] = {}  # never mutated: a layer with something to say returns a dict of its own


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """A layer on paper: hashable, checked in `__post_init__`, and enough to build one of width D."""

    def build(self, D: int, *, rngs: nnx.Rngs) -> "Layer":
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """What a layer computes with besides its config and Params, such as hashes that were drawn; JSON.

        A checkpoint keeps it, and is refused where it is another.
        """
        return {}

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Small instances for tests, probes and benchmarks: each builds at D = 64 and takes any ids below 50."""
        return (cls(),)


class Layer(nnx.Module):
    """out = layer(x, tokens, state): causal, and indifferent to how time is cut.

    Reading T tokens at once, in pieces of any size, or one by one gives the same y. With state None the sequence
    starts fresh and keeps nothing (training); with a state it is continued, and the state handed back (prefill and
    decoding are the same call).

    pointwise: each token is read by itself, whatever stands around it (an MLP).
    """

    pointwise: ClassVar[bool] = False

    def init_state(self, B: int, T: int) -> Any:
        """An empty memory for B sequences of at most T tokens: a NamedTuple of arrays, or () where there is none."""
        raise NotImplementedError

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Any = None) -> Out:
        raise NotImplementedError

    def prefixed(self, x_BTD: Array, tokens: Tokens, prefix_BT: Array, state: Any = None) -> Out:
        """The usual call, of tokens that hold a region: those of `prefix_BT` (bool) in the document a row begins with.

        A layer with an encoder (layers/prefix.py) reads the region as a whole before the first token; what it knows
        then is no more than a state to begin with, so that reading goes on by the usual call. A region is given whole,
        in one call. Other layers do not know of it.
        """
        return self(x_BTD, tokens, state)

    def read(self, x_BTD: Array, tokens: Tokens, at_BN: Array) -> Out:
        """A training call of which only the outputs at places `at_BN` (int32) are wanted: y is [B, N, D].

        A probe asks at few places. Override it where that saves more than the rest of the model.
        """
        out = self(x_BTD, tokens)
        return out._replace(y_BTD=take(out.y_BTD, at_BN))


def take(x: Array, at_BN: Array) -> Array:
    """Tokens at places `at_BN` of each row: [B, T, ...] -> [B, N, ...]."""
    return jnp.take_along_axis(x, at_BN.reshape(at_BN.shape + (1,) * (x.ndim - 2)), 1)


class Einsum(nnx.Module):
    """A linear map named by its equation, e.g. `Einsum("BTD,DHK->BTHK", D=64, H=4, K=16, rngs=rngs)`.

    Letters of the weight that the output loses are its fan-in; the weight is N(0, scale² / fan_in), float32, and is
    cast to the dtype of the input. (`fan_in` in its metadata marks it as a matrix: Muon trains those.) `bias=True`
    adds terms, zeros at first, over the letters that the weight brings. `residual=True` marks a map that writes to the
    residual stream (a model may scale those down with its depth).
    """

    def __init__(
        self,
        equation: str,
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        bias: bool = False,
        residual: bool = False,
        **sizes: int,
    ):
        inputs, axes, output = equation.replace("->", ",").split(",")
        lost = "".join(a for a in axes if a in inputs and a not in output)
        deviation = scale * math.prod(sizes[a] for a in lost) ** -0.5
        w = jax.random.normal(rngs.params(), [sizes[a] for a in axes], jnp.float32) * deviation
        self.equation, self.axes = equation, axes
        self.w = nnx.Param(w, axes=axes, fan_in=lost, residual=residual)
        brings = "".join(a for a in axes if a in output)
        zeros = jnp.zeros([sizes[a] for a in brings], jnp.float32)
        self.b = nnx.Param(zeros, axes=brings, decay=False) if bias else None

    def __call__(self, x: Array) -> Array:
        w = place(self.w[...].astype(x.dtype), self.axes)  # in use: cast first, so that half as much is sent
        y = jnp.einsum(self.equation, x, w)
        if self.b is None:
            return y
        b = self.b[...].astype(x.dtype)
        return y + b.reshape((1,) * (y.ndim - b.ndim) + b.shape)

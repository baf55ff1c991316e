"""Recurrent layers in three steps, for those that put something in between (layers/mixture.py).

query(x), written(x)                      each token by itself
y = run(query, written, pos, state)       the memory: the only step that sees other tokens
finish(y, x)                              what follows the memory: norm, gate and the map to the residual stream
"""

from typing import Any

from flax import nnx
from jax import Array

from layers.layer import Einsum, Layer, Out, Tokens


class Maps(nnx.Module):
    """Maps of one input, by name: x_BTD -> {name: [B, T, ...]}, in the order given."""

    def __init__(self, **maps: Any):
        self.names = tuple(maps)
        for name, module in maps.items():
            setattr(self, name, module)

    def __call__(self, x_BTD: Array) -> dict[str, Any]:
        return {name: getattr(self, name)(x_BTD) for name in self.names}


class LowRank(nnx.Module):
    """One map after the other: to few channels, and to many (an Einsum, or Maps)."""

    def __init__(self, down: Einsum, up: Any):
        self.down, self.up = down, up

    def __call__(self, x: Array) -> Any:
        return self.up(self.down(x))


class Recurrent(Layer):
    """query: what a token asks. written: what it tells the memory; where there are several, each has its own maps."""

    query: Einsum
    written: Maps

    def run(self, q: Array, written: dict[str, Any], pos_BT: Array, state: Any = None) -> tuple[Array, Any, dict]:
        """(what the memory answers [B, T, H, V], the state as it came, aux), of `query(x)` and `written(x)`."""
        raise NotImplementedError

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        """y_BTD."""
        raise NotImplementedError

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Any = None) -> Out:
        y, state, aux = self.run(self.query(x_BTD), self.written(x_BTD), tokens.pos_BT, state)
        return Out(self.finish(y, x_BTD), state, aux)

"""How a law reads a layer: few compiled functions, at few shapes, on numpy arrays.

Compile time is the budget. Each config is judged through `apply` for pieces of 1, 7 and C tokens and for the whole of
T, and `pull` for the gradients at T, all in float64; laws.py adds one program each for bfloat16, for a mesh and for a
stack of layers. C is the config's chunk or window and T is two and a half of them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.layer import LayerConfig, Tokens

D, B, W = 64, 2, 50  # the contract: examples build at this width and take any ids below W
TOLERANCE = 1e-9  # relative, float64
Said: Any = Tokens  # made here of numpy arrays and of shapes, which its annotations do not foresee
QUICK = {"xla_backend_optimization_level": 0}  # for programs that are compiled once and run a few milliseconds


def fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Every (name, value) of a config and of the configs inside it."""
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            yield field.name, value
            for inner in value if isinstance(value, tuple) else (value,):
                yield from fields(inner)


def grain(config: LayerConfig) -> int:
    """C, at least 16: whole periods of what cuts and documents should straddle, the config's chunk or window.

    Where the config is mute C is 64, the usual chunk of an op.
    """
    found = [v for name, v in fields(config) if name in ("chunk", "window", "segment") and isinstance(v, int) and v > 0]
    period = max(found, default=64)
    return period * -(-16 // period)


def length(config: LayerConfig) -> int:
    """T: more than two chunks, and no multiple of anything."""
    return 2 * grain(config) + grain(config) // 2 + 1


@functools.cache
def build(config: LayerConfig) -> Any:
    """Two copies on a leading axis, as a model stacks them, at their initial float32 values."""
    make = jax.vmap(lambda key: config.build(D, rngs=nnx.Rngs(params=key)))
    return jax.device_get(jax.jit(make)(jax.random.split(jax.random.key(0), 2)))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating leaves in `dtype`, as numpy arrays."""
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype) if is_float(a) else np.asarray(a), tree)


def is_float(a: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(a), jnp.floating)


@functools.cache
def stack(config: LayerConfig) -> Any:
    """Two float64 copies, each Param moved off its initial value so that no zero or one hides a term."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: a.astype(np.float64) + 0.1 * rng.standard_normal(a.shape) if is_float(a) else a, build(config)
    )


def copy(stacked: Any, i: int = 0) -> Any:
    return jax.tree.map(lambda a: a[i], stacked)


def fresh(layer: Any, config: LayerConfig, dtype: Any = np.float64) -> Any:
    """An empty memory with room for everything a law reads."""
    return cast(layer.init_state(B, 4 * length(config)), dtype)


def repeat_row(tree: Any, row: int) -> Any:
    """One row of a state in every row."""
    return jax.tree.map(lambda a: np.repeat(a[row : row + 1], B, axis=0), tree)


def stream(T: int, seed: int = 0, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, T, D))


def tokens(pos_BT: np.ndarray, seed: int = 0) -> Tokens:
    ids_BT = np.random.default_rng(seed).integers(0, W, pos_BT.shape)
    return Said(ids_BT.astype(np.int32), pos_BT.astype(np.int32))


def places(T: int, *starts: int) -> np.ndarray:
    """Positions of T tokens whose documents start at 0 and at `starts`."""
    t = np.arange(T)
    return t - np.maximum.reduce([np.where(t >= s, s, 0) for s in (0, *starts)])


def pad(pos_T: np.ndarray, *gaps: tuple[int, int]) -> np.ndarray:
    """Puts padding into [begin, end) of each gap; the tokens pushed off the end are lost."""
    out, source = [], iter(pos_T)
    for t in range(len(pos_T)):
        out.append(-1 if any(begin <= t < end for begin, end in gaps) else next(source))
    return np.array(out)


@functools.partial(jax.jit, compiler_options=QUICK)
def apply(layer: Any, x_BTD: jax.Array, said: Tokens, state: Any) -> tuple[jax.Array, Any]:
    out = layer(x_BTD, said, state)
    return out.y_BTD, out.state


@functools.partial(jax.jit, compiler_options=QUICK)
def pull(layer: Any, x_BTD: jax.Array, said: Tokens, dy_BTD: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
    """y of a training call, and the gradients of sum(y * dy) in the layer and in x."""
    y_BTD, back = jax.vjp(lambda layer, x: layer(x, said).y_BTD, layer, x_BTD)
    return y_BTD, *back(dy_BTD)


def pieces_of(T: int, C: int) -> list[int]:
    """T as pieces of C, 7 and 1: lengths that are compiled anyway."""
    return [C] * (T // C) + [7] * (T % C // 7) + [1] * (T % C % 7)


def read(layer: Any, x_BTD: np.ndarray, said: Tokens, state: Any, pieces: Sequence[int]) -> tuple[np.ndarray, Any]:
    """Reads a sequence piece by piece, each from the state that the last one left."""
    assert sum(pieces) == x_BTD.shape[1]
    ys, start = [], 0
    for n in pieces:
        cut = slice(start, start + n)
        y_BTD, state = apply(layer, x_BTD[:, cut], Said(*(a[:, cut] for a in said)), state)
        ys.append(y_BTD)
        start += n
    return np.concatenate([np.asarray(y) for y in ys], axis=1), jax.device_get(state)


def same(got: Any, want: Any, what: str, tolerance: float = TOLERANCE) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, not {want.shape}"
    assert np.isfinite(got).all(), f"{what}: not finite"
    error = np.abs(got - want).max(initial=0) / (np.abs(want).max(initial=0) + 1e-6)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.0e}"


def same_tree(got: Any, want: Any, what: str, tolerance: float = TOLERANCE) -> None:
    a, b = jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves_with_path(want)
    assert [path for path, _ in a] == [path for path, _ in b], f"{what}: another structure"
    for (path, left), (_, right) in zip(a, b, strict=True):
        same(left, right, f"{what}{jax.tree_util.keystr(path)}", tolerance)


def same_memory(layer: Any, got: Any, want: Any, after_B: np.ndarray, C: int, what: str, tolerance: float = TOLERANCE):
    """Two states are one memory when their arrays agree, or when nothing that reads on can tell them apart.

    The second clause is for caches: what they keep of a forgotten document, or in slots not yet used, is nobody's
    business as long as it is never seen. after_B: place of the next token of each row.
    """
    try:
        return same_tree(got, want, what, tolerance)
    except AssertionError:
        pieces = [1, 7, C]
        x_BTD = stream(sum(pieces), seed=7)
        said = tokens(np.asarray(after_B)[:, None] + np.arange(sum(pieces)), seed=7)
        y_got, _ = read(layer, x_BTD, said, got, pieces)
        y_want, _ = read(layer, x_BTD, said, want, pieces)
        same(y_got, y_want, f"{what}: what is read on", tolerance)

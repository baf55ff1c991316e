"""A language model: words are embedded, pass a flat list of residual layers, and are predicted.

    x = embed(ids) ;  for each layer: x = x + layer(norm(x)) ;  logits = head(norm(x))

Of several residual streams each begins as the embedding, hyper-connections stand for the sum, and the last norm reads
the streams' sum (models/streams.py).

Layers come as stages: a pattern of layers that repeats. The parameters of a stage's repeats are stacked (leading axis
L), whether its repeats are run by a scan (compile time flat in depth) or one after another (faster steps on CPU). A
parameter that says so (`shared=True`) is held once, without that axis, and read by all repeats of its stage.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import LayerConfig, Out, Tokens, one_of, positive, take
from layers.norm import RMSNorm
from layers.ops.place import place, place_found
from layers.ops.precision import wide
from layers.ops.tables import put_back, set_aside
from models.over_encoding import OverEncoding
from models.parameters import is_variable
from models.streams import Hyper, HyperConnection, write

State = tuple[Any, ...]  # by stage, repeat, layer of the pattern; then that of the embedding, where it has n-grams
Skip = tuple[str, ...] | tuple[Array, ...]  # names of layers, or `running` of them


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pattern of layers, run `repeats` times."""

    pattern: tuple[LayerConfig, ...]
    repeats: int = 1

    def __post_init__(self):
        positive(self, "repeats")
        if not self.pattern:
            raise ValueError("Stage.pattern is empty: give it at least one layer")


POLICIES = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@dataclasses.dataclass(frozen=True)
class LM:
    """A language model on paper.

    W: words in the vocabulary. D: width. stages: the layers, in order.
    tied: one matrix embeds and predicts. norm_eps: of every norm on the residual stream.
    residual_scale: maps that write to the residual stream start at this factor of their own init; "depth" is one over
        the square root of the number of layers.
    scan_layers: run the repeats of a stage by a scan; "auto" does so when there are more than 8.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "offload" (the same, and the
        products wait in the host's memory), "block" (each repeat whole).
    dtype: of activations and of matrix operands; parameters are float32.
    softcap: logits become softcap * tanh(logits / softcap).
    ngrams: embed the n-grams that end in a word together with the word; None for words alone.
    streams: residual streams. Layers read a mix of them and write to all; one whose own `streams` says as many reads
        and writes them side by side, added as they are (Engram).
    hyper: how layers and several streams are connected: "mhc", the mixing doubly stochastic, or "hc", free.
    """

    W: int
    D: int
    stages: tuple[Stage, ...]
    tied: bool = False
    norm_eps: float = 1e-6
    residual_scale: float | Literal["depth"] = "depth"
    scan_layers: Literal["auto", "always", "never"] = "auto"
    remat: Literal["none", "dots", "offload", "block"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    softcap: float | None = None
    ngrams: OverEncoding | None = None
    streams: int = 1
    hyper: Hyper = "mhc"

    def __post_init__(self):
        one_of(self)
        positive(self, "W", "D", "streams")
        if isinstance(self.residual_scale, str) and self.residual_scale != "depth":
            raise ValueError(f"LM.residual_scale is {self.residual_scale!r}: give a number, or 'depth'")
        if not self.stages:
            raise ValueError("LM.stages is empty: give it at least one Stage")
        for layer in (self.ngrams, *(layer for stage in self.stages for layer in stage.pattern)):
            words = getattr(layer, "W", self.W)
            if words != self.W:
                raise ValueError(f"{type(layer).__name__}.W is {words}: it must be the model's, LM.W = {self.W}")
            if (G := _streams(layer)) not in (1, self.streams):
                name = f"{type(layer).__name__}.streams"
                raise ValueError(
                    f"{name} is {G}: it must be the model's, LM.streams = {self.streams}, or 1 to read a mix"
                )

    @property
    def depth(self) -> int:
        return sum(len(s.pattern) * s.repeats for s in self.stages)

    def build(self, *, rngs: nnx.Rngs) -> "LanguageModel":
        return LanguageModel(self, rngs=rngs)


def _streams(layer: Any) -> int:
    """How many residual streams a layer's config asks for."""
    return getattr(layer, "streams", 1)


class Block(nnx.Module):
    """One repeat of a pattern, whose first layer is the k-th of its model.

    connections: of each layer to the streams, where there are several; a layer that reads them all has none.
    """

    def __init__(self, pattern: tuple[LayerConfig, ...], config: LM, k: int | Array, *, rngs: nnx.Rngs):
        G, D, eps = config.streams, config.D, config.norm_eps
        widths = [_streams(layer) for layer in pattern]
        self.norms = nnx.List([RMSNorm(D * g, eps=eps, parts=g) for g in widths])
        self.layers = nnx.List([layer.build(D * g, rngs=rngs) for layer, g in zip(pattern, widths, strict=True)])
        mixed = [i for i, g in enumerate(widths) if g < G]
        self.connections = nnx.Dict({str(i): HyperConnection(G, D, k + i, config.hyper, eps=eps) for i in mixed})

    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        states: Any,
        keep: Array | None,
        at_BN: Array | None = None,
        prefix_BT: Array | None = None,
    ):
        """x: the stream [B, T, D], or several [B, T, G, D].

        With `at_BN` (and no states) only those places come out: from the last layer on that mixes them.
        prefix_BT: the region that layers with an encoder read ahead.
        """
        last = max((i for i, layer in enumerate(self.layers) if not layer.pointwise), default=-1)
        if at_BN is not None and last < 0:
            x, tokens = _at(at_BN, x, tokens)
        after: list[Any] = []
        aux: dict[str, Array] = {}
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            state = None if states is None else states[i]
            asked = at_BN if i == last else None
            mixed = str(i) in self.connections
            x_BTD, paths = self.connections[str(i)](x) if mixed else (x.reshape(*x.shape[:2], -1), None)
            normed_BTD = place(norm(x_BTD), "BT")
            if prefix_BT is not None and not layer.pointwise:
                out = layer.prefixed(normed_BTD, tokens, prefix_BT, state)
                out = out if asked is None else out._replace(y_BTD=take(out.y_BTD, asked))
            elif asked is not None:
                out = layer.read(normed_BTD, tokens, asked)
            else:
                out = layer(normed_BTD, tokens, state)
            if asked is not None:
                x, tokens = _at(asked, x, tokens)
                paths = None if paths is None else paths.at(asked)
            y_BTD = out.y_BTD if keep is None else jnp.where(keep[i], out.y_BTD, 0)
            x = place(x + y_BTD.reshape(x.shape) if paths is None else write(x, y_BTD, paths), "BT")
            after.append(out.state)
            aux |= {f"{i}/{name}": value for name, value in out.aux.items()}
        return x, None if states is None else tuple(after), aux


def _at(at_BN: Array, x: Array, tokens: Tokens) -> tuple[Array, Tokens]:
    return take(x, at_BN), Tokens(*(take(a, at_BN) for a in tokens))


class LanguageModel(nnx.Module):
    def __init__(self, config: LM, *, rngs: nnx.Rngs):
        self.config, W, D = config, config.W, config.D
        self.embed = nnx.Param(jax.random.normal(rngs.params(), [W, D], jnp.float32) * D**-0.5, axes="WD")
        before = itertools.accumulate((len(stage.pattern) * stage.repeats for stage in config.stages[:-1]), initial=0)
        stages = zip(config.stages, before, strict=True)
        self.stages: Any = nnx.List([self._stage(stage, k, rngs) for stage, k in stages])
        self.norm = RMSNorm(D, eps=config.norm_eps)
        self.ngrams = None if config.ngrams is None else config.ngrams.build(D, rngs=rngs)
        self.head = None if config.tied else nnx.Param(jnp.zeros([W, D], jnp.float32), axes="WD")

    def _stage(self, stage: Stage, k: int, rngs: nnx.Rngs) -> Block:
        """k: layers before it."""
        config = self.config

        def build(key: Array, k: Array) -> Block:
            return Block(stage.pattern, config, k, rngs=nnx.Rngs(params=key))

        keys = jax.random.split(rngs.params(), stage.repeats)
        ks = k + jnp.arange(stage.repeats) * len(stage.pattern)
        block = jax.vmap(build)(keys, ks)
        if any(_is_shared(variable) for variable in _variables(block)):
            for held, first in zip(_variables(block), _variables(build(keys[0], ks[0])), strict=True):
                if _is_shared(held):
                    held.set_value(first[...])
        scale = config.depth**-0.5 if config.residual_scale == "depth" else config.residual_scale
        for variable in _variables(block):
            if variable.get_metadata().get("residual"):
                variable[...] = variable[...] * scale
        return block

    def init_state(self, B: int, T: int) -> State:
        """Empty memories for B sequences of at most T tokens: by stage, repeat and layer; then the embedding's."""
        stages = tuple(
            tuple(tuple(layer.init_state(B, T) for layer in block.layers) for block in _apart(blocks, stage))
            for blocks, stage in zip(self.stages, self.config.stages, strict=True)
        )
        return stages if self.ngrams is None else (*stages, self.ngrams.init_state(B))

    def unstacked(self) -> "LanguageModel":
        """The same model with the repeats of each stage laid out apart, so that a decoding loop copies no weights."""
        twin = jax.tree.map(lambda leaf: leaf, self)  # modules anew, the same arrays
        apart = [_apart(blocks, stage) for blocks, stage in zip(self.stages, self.config.stages, strict=True)]
        twin.stages = nnx.List([nnx.List(blocks) for blocks in apart])
        return twin

    def hidden(
        self,
        tokens: Tokens,
        state: State | None = None,
        *,
        skip: Skip = (),
        at_BN: Array | None = None,
        prefix_BT: Array | None = None,
    ) -> Out:
        """The residual stream after the last norm, [B, T, D] in the compute dtype.

        prefix_BT: bool, a region that layers with an encoder read ahead (see Layer.prefixed); None for none.

        at_BN: int32, the places that are wanted: y is [B, N, D], and the last layers do no more than that takes. With
        a state: ValueError, since all of the tokens have to be remembered.
        skip: layers to leave out, as "stage.repeat.layer" or "stage.*.layer" (ablation at evaluation; their states
            still advance); ValueError for a name that no layer has. Or arrays, as `running` makes them of names: then
            one compiled program serves every choice.

        aux: each layer's, as "stage.repeat.layer/name"; a scanned stage's as "stage.*.layer/name", stacked; the
        embedding's as "ngrams/name".
        """
        config = self.config
        keeps = _keeps(config, skip)
        if state is not None and at_BN is not None:
            raise ValueError("LanguageModel.hidden: places (at_BN) are for training calls, which have no state")
        dtype = jnp.dtype(config.dtype)
        if self.embed[...].dtype == jnp.float64:  # a model cast to float64 is a judge: compute in it
            dtype = jnp.dtype(jnp.float64)
        # Cast after the look-up: its gradient adds up in float32, and a decoding step casts no table.
        x_BTD = place_found(jnp.take(self.embed[...], tokens.ids_BT, axis=0).astype(dtype))
        x_BTD = place(x_BTD * jnp.asarray(config.D**0.5, dtype), "BT")
        after: list[Any] = []
        aux: dict[str, Array] = {}
        seen: tuple[Any, ...] = ()
        if self.ngrams is not None:
            out = self.ngrams(x_BTD, tokens, None if state is None else state[-1])
            x_BTD, seen = out.y_BTD, (out.state,)
            aux |= {f"ngrams/{name}": value for name, value in out.aux.items()}
        x = x_BTD
        if config.streams > 1:
            x = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], config.streams, config.D))
        for s, (stage, blocks) in enumerate(zip(config.stages, self.stages, strict=True)):
            states = None if state is None else state[s]
            ends = s == len(config.stages) - 1
            asked = at_BN if ends else None
            x, states, said = self._run(stage, blocks, x, tokens, states, keeps[s], asked, prefix_BT)
            after.append(states)
            aux |= {f"{s}.{name}": value for name, value in said.items()}
        if config.streams > 1:
            x = jnp.sum(x.astype(wide(x)), 2).astype(dtype)
        return Out(self.norm(x), None if state is None else (*after, *seen), aux)

    def _run(
        self,
        stage: Stage,
        blocks: Any,
        x: Array,
        tokens: Tokens,
        states: Any,
        keep: Array | None,
        at_BN: Array | None,
        prefix_BT: Array | None,
    ):
        config = self.config
        scan = config.scan_layers == "always" or (config.scan_layers == "auto" and stage.repeats > 8)

        tables, blocks = set_aside(blocks)  # a scan, or a cut by repeats, would copy them

        def call(block, x, states, keep, at_BN):
            return put_back(tables, block)(x, tokens, states, keep, at_BN, prefix_BT)

        if config.remat != "none":
            call = jax.checkpoint(call, policy=POLICIES[config.remat])

        if scan and not isinstance(blocks, nnx.List):
            own, block_of = _own(blocks)

            def body(x, xs):
                x, after, said = call(block_of(xs[0]), x, xs[1], xs[2], None)
                return x, (after, said)

            stacked = None if states is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x, (new, said) = jax.lax.scan(body, x, (own, stacked, keep))
            new = None if states is None else tuple(unstack(new, stage.repeats))
            x = x if at_BN is None else take(x, at_BN)
            return x, new, {f"*.{name}": value for name, value in said.items()}

        after: list[Any] = []
        aux: dict[str, Array] = {}
        for r, block in enumerate(_apart(blocks, stage)):
            x, new, said = call(
                block,
                x,
                None if states is None else states[r],
                None if keep is None else keep[r],
                at_BN if r == stage.repeats - 1 else None,
            )
            after.append(new)
            aux |= {f"{r}.{name}": value for name, value in said.items()}
        return x, None if states is None else tuple(after), aux

    def words(self) -> Array:
        """float32 [W, D]: what predicts each word."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, hidden: Array, words_WD: Array | None = None) -> Array:
        """[..., D] -> float32 [..., W]. words_WD: `words()`, where they were put together for several calls."""
        words_WD = self.words() if words_WD is None else words_WD
        wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
        words_WD = place(words_WD.astype(hidden.dtype), "WD")
        logits = jnp.einsum("...D,WD->...W", hidden, words_WD, preferred_element_type=wide)
        cap = self.config.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(
        self,
        tokens: Tokens,
        state: State | None = None,
        *,
        skip: Skip = (),
        prefix_BT: Array | None = None,
    ) -> Out:
        """y is float32 logits [B, T, W]."""
        out = self.hidden(tokens, state, skip=skip, prefix_BT=prefix_BT)
        return Out(self.logits(out.y_BTD), out.state, out.aux)


def unstack(stacked: Any, repeats: int) -> list[Any]:
    """A pytree with a leading axis -> a list of pytrees. One split a leaf: its gradient is one concatenation."""
    leaves, treedef = jax.tree.flatten(stacked)
    split = [jax.lax.split(leaf, [1] * repeats, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [jax.lax.squeeze(parts[i], [0]) for parts in split]) for i in range(repeats)]


def _apart(blocks: Any, stage: Stage) -> list[Block]:
    """The repeats of a stage, one module each, whether they lie stacked or apart."""
    if isinstance(blocks, nnx.List):
        return list(blocks)
    own, block_of = _own(blocks)
    return [block_of(arrays) for arrays in unstack(own, stage.repeats)]


def _own(blocks: Block) -> tuple[list[nnx.Variable], Callable[[list[nnx.Variable]], Block]]:
    """What each repeat has for itself, stacked; and how one repeat's, with what is shared, makes its block."""
    variables, structure = jax.tree.flatten(blocks, is_leaf=is_variable)

    def block_of(own: list[nnx.Variable]) -> Block:
        rest = iter(own)
        return jax.tree.unflatten(structure, [v if _is_shared(v) else next(rest) for v in variables])

    return [v for v in variables if not _is_shared(v)], block_of


def _variables(module: Any) -> list[nnx.Variable]:
    return jax.tree.leaves(module, is_leaf=is_variable)


def _is_shared(variable: nnx.Variable) -> bool:
    return variable.get_metadata().get("shared", False)


def running(config: LM, skip: tuple[str, ...]) -> tuple[Array, ...]:
    """Which layers run without those of `skip`, by stage: bool [repeats, layers of the pattern]. For `hidden`'s skip.

    Raises ValueError for a name in `skip` that no layer answers to.
    """
    check_skip(config, skip)
    return tuple(jnp.array(_kept(stage, s, skip)) for s, stage in enumerate(config.stages))


def _keeps(config: LM, skip: Skip) -> list[Array | None]:
    """By stage, which layers run; None for all."""
    names = tuple(name for name in skip if isinstance(name, str))
    if len(names) < len(skip):
        return list(skip)  # type: ignore[arg-type]
    check_skip(config, names)
    kept = [_kept(stage, s, names) for s, stage in enumerate(config.stages)]
    return [None if all(map(all, rows)) else jnp.array(rows) for rows in kept]


def _kept(stage: Stage, index: int, skip: tuple[str, ...]) -> list[list[bool]]:
    """Which layers run, by repeat and layer of the pattern."""
    names = [[(f"{index}.{r}.{i}", f"{index}.*.{i}") for i in range(len(stage.pattern))] for r in range(stage.repeats)]
    return [[not set(pair) & set(skip) for pair in row] for row in names]


def rows_read(aux: dict[str, Array]) -> dict[str, list[Array]]:
    """What `hidden`'s aux says of look-ups: the rows of each table by parameter's name, an array for each repeat."""
    found: dict[str, list[Array]] = {}
    for label, said in aux.items():
        where, _, name = label.partition("/rows/")
        if name and where == "ngrams":
            found[f"ngrams.{name}"] = [said]
        elif name:
            stage, repeat, layer = where.split(".")
            found.setdefault(f"stages.{stage}.layers.{layer}.{name}", []).extend(said if repeat == "*" else [said])
    return found


def check_skip(config: LM, skip: tuple[str, ...]) -> None:
    """Raises ValueError for a name in `skip` that no layer answers to."""
    known = {
        f"{s}.{r}.{i}"
        for s, stage in enumerate(config.stages)
        for r in [*range(stage.repeats), "*"]
        for i in range(len(stage.pattern))
    }
    unknown = [name for name in skip if name not in known]
    if unknown:
        raise ValueError(f"skip names {unknown[0]!r}, which no layer has: they are {', '.join(sorted(known))}")

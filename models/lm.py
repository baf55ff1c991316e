"""A language model: words are embedded, pass a flat list of residual layers, and are predicted.

    x = embed(ids) ;  for each layer: x = x + layer(norm(x)) ;  logits = head(norm(x))

Layers come as stages: a pattern of layers that repeats. The parameters of a stage's repeats are stacked (leading axis
L), whether its repeats are run by a scan (compile time flat in depth) or one after another (faster steps on CPU). A
parameter that says so (`shared=True`) is held once, without that axis, and read by all repeats of its stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import LayerConfig, Out, Tokens, positive, take
from layers.norm import RMSNorm
from layers.ops.tables import put_back, set_aside
from models.over_encoding import OverEncoding
from models.parameters import is_variable

State = tuple[Any, ...]  # by stage, repeat, layer of the pattern; then that of the embedding, where it has n-grams


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pattern of layers, run `repeats` times."""

    pattern: tuple[LayerConfig, ...]
    repeats: int = 1

    def __post_init__(self):
        positive(self, "repeats")
        if not self.pattern:
            raise ValueError("Stage.pattern is empty: give it at least one layer")


@dataclasses.dataclass(frozen=True)
class LM:
    """A language model on paper.

    W: words in the vocabulary. D: width. stages: the layers, in order.
    tied: one matrix embeds and predicts. norm_eps: of every norm on the residual stream.
    residual_scale: maps that write to the residual stream start at this factor of their own init; "depth" is one over
        the square root of the number of layers.
    scan_layers: run the repeats of a stage by a scan; "auto" does so when there are more than 8.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "block" (each repeat whole).
    dtype: of activations and of matrix operands; parameters are float32.
    softcap: logits become softcap * tanh(logits / softcap).
    ngrams: embed the n-grams that end in a word together with the word; None for words alone.
    """

    W: int
    D: int
    stages: tuple[Stage, ...]
    tied: bool = False
    norm_eps: float = 1e-6
    residual_scale: float | Literal["depth"] = "depth"
    scan_layers: Literal["auto", "always", "never"] = "auto"
    remat: Literal["none", "dots", "block"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    softcap: float | None = None
    ngrams: OverEncoding | None = None

    def __post_init__(self):
        positive(self, "W", "D")
        if not self.stages:
            raise ValueError("LM.stages is empty: give it at least one Stage")
        for layer in (self.ngrams, *(layer for stage in self.stages for layer in stage.pattern)):
            words = getattr(layer, "W", self.W)
            if words != self.W:
                raise ValueError(f"{type(layer).__name__}.W is {words}: it must be the model's, LM.W = {self.W}")

    @property
    def depth(self) -> int:
        return sum(len(s.pattern) * s.repeats for s in self.stages)

    def build(self, *, rngs: nnx.Rngs) -> "LanguageModel":
        return LanguageModel(self, rngs=rngs)


class Block(nnx.Module):
    """One repeat of a pattern."""

    def __init__(self, pattern: tuple[LayerConfig, ...], D: int, eps: float, *, rngs: nnx.Rngs):
        self.norms = nnx.List([RMSNorm(D, eps=eps) for _ in pattern])
        self.layers = nnx.List([config.build(D, rngs=rngs) for config in pattern])

    def __call__(
        self,
        x_BTD: Array,
        tokens: Tokens,
        states: Any,
        keep: Array | None,
        at_BN: Array | None = None,
        prefix_BT: Array | None = None,
    ):
        """With `at_BN` (and no states) only those places come out: from the last layer on that mixes them.

        prefix_BT: the region that layers with an encoder read ahead.
        """
        last = max((i for i, layer in enumerate(self.layers) if not layer.pointwise), default=-1)
        if at_BN is not None and last < 0:
            x_BTD, tokens = _at(at_BN, x_BTD, tokens)
        after: list[Any] = []
        aux: dict[str, Array] = {}
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            state = None if states is None else states[i]
            asked = at_BN if i == last else None
            if prefix_BT is not None and not layer.pointwise:
                out = layer.prefixed(norm(x_BTD), tokens, prefix_BT, state)
                out = out if asked is None else out._replace(y_BTD=take(out.y_BTD, asked))
            elif asked is not None:
                out = layer.read(norm(x_BTD), tokens, asked)
            else:
                out = layer(norm(x_BTD), tokens, state)
            if asked is not None:
                x_BTD, tokens = _at(asked, x_BTD, tokens)
            y_BTD = out.y_BTD if keep is None else jnp.where(keep[i], out.y_BTD, 0)
            x_BTD = x_BTD + y_BTD
            after.append(out.state)
            aux |= {f"{i}/{name}": value for name, value in out.aux.items()}
        return x_BTD, None if states is None else tuple(after), aux


def _at(at_BN: Array, x_BTD: Array, tokens: Tokens) -> tuple[Array, Tokens]:
    return take(x_BTD, at_BN), Tokens(*(take(a, at_BN) for a in tokens))


class LanguageModel(nnx.Module):
    def __init__(self, config: LM, *, rngs: nnx.Rngs):
        self.config, W, D = config, config.W, config.D
        self.embed = nnx.Param(jax.random.normal(rngs.params(), [W, D], jnp.float32) * D**-0.5, axes="WD")
        self.stages: Any = nnx.List([self._stage(stage, rngs) for stage in config.stages])
        self.norm = RMSNorm(D, eps=config.norm_eps)
        self.ngrams = None if config.ngrams is None else config.ngrams.build(D, rngs=rngs)
        self.head = None if config.tied else nnx.Param(jnp.zeros([W, D], jnp.float32), axes="WD")

    def _stage(self, stage: Stage, rngs: nnx.Rngs) -> Block:
        config = self.config

        def build(key: Array) -> Block:
            return Block(stage.pattern, config.D, config.norm_eps, rngs=nnx.Rngs(params=key))

        keys = jax.random.split(rngs.params(), stage.repeats)
        block = jax.vmap(build)(keys)
        if any(_is_shared(variable) for variable in _variables(block)):
            for held, first in zip(_variables(block), _variables(build(keys[0])), strict=True):
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
        skip: tuple[str, ...] = (),
        at_BN: Array | None = None,
        prefix_BT: Array | None = None,
    ) -> Out:
        """The residual stream after the last norm, [B, T, D] in the compute dtype.

        prefix_BT: bool, a region that layers with an encoder read ahead (see Layer.prefixed); None for none.

        at_BN: int32, the places that are wanted: y is [B, N, D], and the last layers do no more than that takes. With
        a state: ValueError, since all of the tokens have to be remembered.
        skip: layers to leave out, as "stage.repeat.layer" or "stage.*.layer" (ablation at evaluation; their states
        still advance); ValueError for a name that no layer has. aux: each layer's, as "stage.repeat.layer/name"; a
        scanned stage's as "stage.*.layer/name", stacked; the embedding's as "ngrams/name".
        """
        config = self.config
        check_skip(config, skip)
        if state is not None and at_BN is not None:
            raise ValueError("LanguageModel.hidden: places (at_BN) are for training calls, which have no state")
        dtype = jnp.dtype(config.dtype)
        if self.embed[...].dtype == jnp.float64:  # a model cast to float64 is a judge: compute in it
            dtype = jnp.dtype(jnp.float64)
        # Cast after the look-up: its gradient adds up in float32, and a decoding step casts no table.
        x_BTD = jnp.take(self.embed[...], tokens.ids_BT, axis=0).astype(dtype) * jnp.asarray(config.D**0.5, dtype)
        after: list[Any] = []
        aux: dict[str, Array] = {}
        seen: tuple[Any, ...] = ()
        if self.ngrams is not None:
            out = self.ngrams(x_BTD, tokens, None if state is None else state[-1])
            x_BTD, seen = out.y_BTD, (out.state,)
            aux |= {f"ngrams/{name}": value for name, value in out.aux.items()}
        for s, (stage, blocks) in enumerate(zip(config.stages, self.stages, strict=True)):
            states = None if state is None else state[s]
            keep = _kept(stage, s, skip)
            ends = s == len(config.stages) - 1
            asked = at_BN if ends else None
            x_BTD, states, said = self._run(stage, blocks, x_BTD, tokens, states, keep, asked, prefix_BT)
            after.append(states)
            aux |= {f"{s}.{name}": value for name, value in said.items()}
        return Out(self.norm(x_BTD), None if state is None else (*after, *seen), aux)

    def _run(
        self,
        stage: Stage,
        blocks: Any,
        x_BTD: Array,
        tokens: Tokens,
        states: Any,
        keep: Array | None,
        at_BN: Array | None,
        prefix_BT: Array | None,
    ):
        config = self.config
        scan = config.scan_layers == "always" or (config.scan_layers == "auto" and stage.repeats > 8)

        tables, blocks = set_aside(blocks)  # a scan, or a cut by repeats, would copy them

        def call(block, x_BTD, states, keep, at_BN):
            return put_back(tables, block)(x_BTD, tokens, states, keep, at_BN, prefix_BT)

        if config.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            call = jax.checkpoint(call, policy=policy)

        if scan and not isinstance(blocks, nnx.List):
            own, block_of = _own(blocks)

            def body(x_BTD, xs):
                x_BTD, after, said = call(block_of(xs[0]), x_BTD, xs[1], xs[2], None)
                return x_BTD, (after, said)

            stacked = None if states is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            x_BTD, (new, said) = jax.lax.scan(body, x_BTD, (own, stacked, keep))
            new = None if states is None else tuple(unstack(new, stage.repeats))
            x_BTD = x_BTD if at_BN is None else take(x_BTD, at_BN)
            return x_BTD, new, {f"*.{name}": value for name, value in said.items()}

        after: list[Any] = []
        aux: dict[str, Array] = {}
        for r, block in enumerate(_apart(blocks, stage)):
            x_BTD, new, said = call(
                block,
                x_BTD,
                None if states is None else states[r],
                None if keep is None else keep[r],
                at_BN if r == stage.repeats - 1 else None,
            )
            after.append(new)
            aux |= {f"{r}.{name}": value for name, value in said.items()}
        return x_BTD, None if states is None else tuple(after), aux

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., W]."""
        head = self.embed if self.head is None else self.head
        wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
        logits = jnp.einsum("...D,WD->...W", hidden, head[...].astype(hidden.dtype), preferred_element_type=wide)
        cap = self.config.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(
        self,
        tokens: Tokens,
        state: State | None = None,
        *,
        skip: tuple[str, ...] = (),
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


def _kept(stage: Stage, index: int, skip: tuple[str, ...]) -> Array | None:
    """Which layers run, bool [repeats, layers of the pattern]; None for all."""
    names = [[(f"{index}.{r}.{i}", f"{index}.*.{i}") for i in range(len(stage.pattern))] for r in range(stage.repeats)]
    keep = [[not set(pair) & set(skip) for pair in row] for row in names]
    return None if all(map(all, keep)) else jnp.array(keep)


def rows_read(aux: dict[str, Array]) -> dict[str, list[Array]]:
    """What `hidden`'s aux says of look-ups: the rows of each table by parameter's name, an array for each repeat."""
    found: dict[str, list[Array]] = {}
    for place, said in aux.items():
        where, _, name = place.partition("/rows/")
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

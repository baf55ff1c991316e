"""The parts of a trained model, and what it says of held-out rows without each of them.

    layers   a layer or MLP adds nothing to the residual stream (LanguageModel.hidden's skip)
    tables   a table that is looked up is all zeros
    writes   a memory is not written from the middle of each row on (probes/frozen.py); second halves alone count
    window   windows are half as wide, a quarter, ... down to the token itself, with the same parameters

A place is a layer's "stage.repeat.layer", or "stage.*.layer" for all repeats of a pattern's place; "ngrams" is the
embedding's, and "all" stands for all places of the kind.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import Array

from layers.attention import Attention
from models.lm import LM, LanguageModel, running
from models.loss import Scores
from models.parameters import Structure, flatten
from probes.frozen import NGRAMS, FrozenReader
from probes.small_runs import scored
from training.data import Batch, Dataset
from training.settings import ConfigError
from training.step import LOG2


class Rows(NamedTuple):
    """Of each row that asks something, float64 [R]. value = sum / weight, over all rows.

    sum_R: bits of its labels, or labels said right. weight_R: bytes of text, or labels. asked_R: labels.
    """

    sum_R: npt.NDArray[np.float64]
    weight_R: npt.NDArray[np.float64]
    asked_R: npt.NDArray[np.float64]


class Piece(NamedTuple):
    """Something that can be left out. place: of the layer. layer: what it is. width: of a window."""

    place: str
    layer: str
    width: int | None
    ask: Callable[[], Rows]

    @property
    def key(self) -> dict[str, Any]:
        return {"place": self.place, "layer": self.layer, "width": self.width}


class Asked:
    """A trained model and the rows that it is asked.

    measure: "bits_per_byte" of text, "accuracy" of what else is asked: the share of labels said right.
    """

    def __init__(self, model: LanguageModel, dataset: Dataset, batches: int):
        self.model, self.config, self.dataset, self.batches = model, model.config, dataset, batches
        self.params, self.structure = flatten(model)
        self.measure = "bits_per_byte" if dataset.token_bytes.any() else "accuracy"

    @functools.cached_property
    def data(self) -> list[Batch]:
        return list(self.dataset.held_out(self.batches))

    def whole(self, part: str) -> Rows:
        return self._whole_second if part == "writes" else self._whole

    @functools.cached_property
    def _whole(self) -> Rows:
        return self.rows()

    @functools.cached_property
    def _whole_second(self) -> Rows:
        return self.frozen(())

    def rows(
        self, *, skip: tuple[str, ...] = (), zero: dict[str, Array] | None = None, structure: Structure | None = None
    ) -> Rows:
        """All rows, read at once. skip: layers. zero: tables by parameter. structure: a model with other windows."""
        made = self._own if structure is None else self._program(structure)
        runs = running(self.config, skip)
        return gathered([made({**self.params, **(zero or {})}, batch, runs) for batch in self.data])

    @functools.cached_property
    def _own(self) -> Any:
        return self._program(self.structure)

    def _program(self, structure: Structure) -> Any:
        """(parameters, batch, which layers run) -> sums: one program for all that leaves the structure as it is."""

        def sums(params: Any, batch: Batch, runs: tuple[Array, ...]) -> Array:
            return self.sums(scored(structure.module(params), batch, self.dataset.labelled, runs))

        return jax.jit(sums)

    def sums(self, s: Scores) -> Array:
        """Sum, weight and labels of each row, float32 [3, B]."""
        asked_B = jnp.sum(s.asked, 1)
        if self.measure == "accuracy":
            return jnp.stack([jnp.sum(s.correct, 1), asked_B, asked_B])
        bytes_BT = jnp.take(jnp.asarray(self.dataset.token_bytes, jnp.float32), jnp.maximum(s.labels, 0)) * s.asked
        return jnp.stack([jnp.sum(s.nll, 1) / LOG2, jnp.sum(bytes_BT, 1), asked_B])

    @functools.cached_property
    def reader(self) -> FrozenReader:
        return FrozenReader(self.model)

    @functools.cached_property
    def _middles(self) -> list[Any]:
        return [self.reader.before(batch) for batch in self.data]

    def frozen(self, places: Sequence[str]) -> Rows:
        """The second halves of all rows, with the states of some places frozen."""
        pairs = zip(self.data, self._middles, strict=True)
        return gathered([self.sums(self.reader(batch, before, places)) for batch, before in pairs])

    def layers(self) -> Iterator[Piece]:
        for name, s, i in places(self.config):
            yield Piece(name, _kind(self.config, s, i), None, functools.partial(self.rows, skip=(name,)))

    def tables(self) -> Iterator[Piece]:
        for parameter in (name for name, spec in self.structure.specs.items() if spec.table):
            for place, layer, zero in zeroed(self.config, self.structure, parameter):
                yield Piece(place, layer, None, functools.partial(self.empty, parameter, zero))

    def empty(self, parameter: str, zero: Callable[[Array], Array]) -> Rows:
        return self.rows(zero={parameter: zero(self.params[parameter])})

    def writes(self) -> Iterator[Piece]:
        try:
            known = self.reader.places
        except ValueError:  # it cannot be read with a state
            return
        if NGRAMS in known:
            yield Piece(NGRAMS, "OverEncoding", None, functools.partial(self.frozen, [NGRAMS]))
        for name, s, i in places(self.config):
            frozen = [place for place in known if _among(place, name)]
            if frozen:
                yield Piece(name, _kind(self.config, s, i), None, functools.partial(self.frozen, frozen))
        if len(known) > 1:
            yield Piece("all", "memories", None, functools.partial(self.frozen, known))

    def window(self) -> Iterator[Piece]:
        T = next(self.dataset.held_out(1)).ids_BT.shape[1]
        found: dict[str, tuple[int, int]] = {}
        for name, s, i in places(self.config):
            if name == f"{s}.*.{i}" or self.config.stages[s].repeats == 1:
                if widest(self.config.stages[s].pattern[i], T) > 1:
                    found[name] = (s, i)
        groups = {name: [at] for name, at in found.items()} | ({"all": [*found.values()]} if len(found) > 1 else {})
        for name, chosen in groups.items():
            layer = _kind(self.config, *chosen[0]) if len(chosen) == 1 else "windows"
            width = max(widest(self.config.stages[s].pattern[i], T) for s, i in chosen) // 2
            while width >= 1:
                yield Piece(name, layer, width, functools.partial(self.narrow, tuple(chosen), width))
                width //= 2

    def narrow(self, chosen: Sequence[tuple[int, int]], width: int) -> Rows:
        """All rows, read by a model whose layers at some (stage, layer of the pattern) see at most `width` tokens."""
        config = narrowed_model(self.config, chosen, width)
        structure = flatten(jax.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1]
        if structure.specs != self.structure.specs:
            raise ConfigError(f"a window of {width} would give the model other parameters: choose --parts without it")
        return self.rows(structure=structure)


def gathered(batches: Sequence[Array]) -> Rows:
    """Rows of batches of [3, B], those that ask something."""
    table = np.concatenate([np.asarray(batch, np.float64) for batch in batches], 1)
    return Rows(*table[:, table[2] > 0])


def places(config: LM) -> Iterator[tuple[str, int, int]]:
    """(place, stage, layer of the pattern): of each layer all of its repeats together, then each by itself."""
    for s, stage in enumerate(config.stages):
        for i in range(len(stage.pattern)):
            for r in ["*", *range(stage.repeats)] if stage.repeats > 1 else [0]:
                yield f"{s}.{r}.{i}", s, i


def zeroed(config: LM, structure: Structure, parameter: str) -> Iterator[tuple[str, str, Callable[[Array], Array]]]:
    """Of a table by its parameter's name: (place, what it is, what makes it zeros), all repeats and then each."""
    spec = structure.specs[parameter]
    first, *names = parameter.split(".")
    if first == NGRAMS:
        yield NGRAMS, f"OverEncoding {names[-1]}", jnp.zeros_like
        return
    s, i = int(names[0]), int(names[2])
    layer = " ".join([_kind(config, s, i), *names[3:]])
    repeats = config.stages[s].repeats
    yield f"{s}.{'*' if repeats > 1 else 0}.{i}", layer, jnp.zeros_like
    if repeats > 1 and spec.axes.startswith("L"):  # each repeat has one of its own
        for r in range(repeats):
            yield f"{s}.{r}.{i}", layer, functools.partial(_without_repeat, r=r)


def _without_repeat(table: Array, r: int) -> Array:
    return table.at[r].set(0)


def widest(config: Any, T: int) -> int:
    """The widest window of a layer and of those within it, at most T; 0 where there is none."""
    inner = [widest(part, T) for part in _parts(config).values()]
    return max([min(_window(config, T), T), *inner])


def narrowed(config: Any, width: int) -> Any:
    """A layer's config with windows of at most `width`, its own and those of layers within it.

    Attention without a window sees everything, so it gets one; other layers without a window have none to narrow.
    """
    changes = {name: narrowed(part, width) for name, part in _parts(config).items()}
    if _window(config, width + 1) > width:
        changes["window"] = width
    return dataclasses.replace(config, **changes) if changes else config


def narrowed_model(config: LM, chosen: Sequence[tuple[int, int]], width: int) -> LM:
    """chosen: (stage, layer of the pattern) of the layers that see at most `width` tokens."""
    stages = [
        dataclasses.replace(
            stage,
            pattern=tuple(
                narrowed(layer, width) if (s, i) in chosen else layer for i, layer in enumerate(stage.pattern)
            ),
        )
        for s, stage in enumerate(config.stages)
    ]
    return dataclasses.replace(config, stages=tuple(stages))


def _window(config: Any, everything: int) -> int:
    window = getattr(config, "window", None)
    return everything if window is None and isinstance(config, Attention) else window or 0


def _parts(config: Any) -> dict[str, Any]:
    """The configs within a config, by field."""
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if dataclasses.is_dataclass(value)}


def _kind(config: LM, s: int, i: int) -> str:
    return type(config.stages[s].pattern[i]).__name__


def _among(place: str, name: str) -> bool:
    """Whether a layer's place is one that a name with or without a star stands for."""
    return len(place.split(".")) == 3 and all(
        b in ("*", a) for a, b in zip(place.split("."), name.split("."), strict=True)
    )

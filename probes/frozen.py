"""Memories that stop writing in the middle of a row: what a layer has read since then is not in its state.

The first half of a row is read as ever. Then every token is read with a frozen layer's state as it was at the middle:
the layer knows the first half and the token itself, and nothing between. All other layers go on as ever. Such reading
is exact when it goes token by token, which by the law of layers is the same as reading at once.

A state is frozen whole: with a memory go the tail of its convolution, the last ids of its n-grams and the ring of its
window, which still shows the last tokens before the middle, however long ago they were.

Forgetting is no writing. A document that starts after the middle empties the state at its start, as it does every
state, and since nothing is written the layer's memory stays empty until the next one starts: its tokens count, too.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.layer import Tokens
from models.lm import LanguageModel
from models.loss import Scores, score
from training.data import NOT_ASKED, Batch

GRID = 8  # first halves end at as many places of a row: few programs are compiled where rows differ in length
NGRAMS = "ngrams"  # the place of the embedding's own state


class FrozenReader:
    """A model that reads the second halves of rows with some of its states frozen, all by one program.

    places: what has a state: layers as "stage.repeat.layer", and the embedding's n-grams as "ngrams".
    Raises ValueError for a model that cannot be read with a state.
    """

    def __init__(self, model: LanguageModel):
        self.model = jax.jit(LanguageModel.unstacked)(model)
        two, three = (jax.eval_shape(lambda m, B=B: m.init_state(B, 2), self.model) for B in (2, 3))
        one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        jax.eval_shape(lambda m, state, x: m.hidden(Tokens(x, x), state).y_BTD, self.model, two, one)
        leaves, others = jax.tree.leaves_with_path(two), jax.tree.leaves(three)
        self._axes = [
            next(n for n, (a, b) in enumerate(zip(leaf.shape, other.shape, strict=True)) if a != b)
            for (_, leaf), other in zip(leaves, others, strict=True)
        ]
        names = [_place(path, len(model.config.stages)) for path, _ in leaves]
        self.places = list(dict.fromkeys(names))
        self._which = [self.places.index(name) for name in names]
        self._first = jax.jit(self._read)
        self._second = jax.jit(self._step_by_step)

    def halves(self, batch: Batch) -> tuple[int, np.ndarray]:
        """Where a batch is cut, at or before the first of its rows' middles; and the middles, int [B].

        A row's middle is half of its tokens; a region that is read ahead is in the first half whole.
        """
        T = batch.ids_BT.shape[1]
        count_B = (batch.pos_BT >= 0).sum(1)
        ahead = 0 if batch.prefix_BT is None else int(np.flatnonzero(batch.prefix_BT.any(0)).max(initial=-1)) + 1
        middle_B = np.maximum(count_B // 2, ahead)
        step = max(1, T // GRID)
        first = int(middle_B[count_B > 0].min(initial=T // 2))
        return max(first // step * step, ahead), middle_B

    def before(self, batch: Batch) -> Any:
        """The state where a batch is cut: for `__call__`, however often it is asked."""
        start, _ = self.halves(batch)
        tokens = Tokens(*(jnp.asarray(x[:, :start]) for x in (batch.ids_BT, batch.pos_BT)))
        region = None if batch.prefix_BT is None else jnp.asarray(batch.prefix_BT[:, :start])
        empty = self.model.init_state(*batch.ids_BT.shape)
        return self._first(self.model, empty, tokens, region) if start else empty

    def __call__(self, batch: Batch, before: Any, frozen: Collection[str]) -> Scores:
        """Scores of the second halves, [B, N]. frozen: places; none reads them as ever."""
        start, middle_B = self.halves(batch)
        B, T = batch.ids_BT.shape
        after_BT = np.arange(T) >= middle_B[:, None]
        labels_BT = np.where(after_BT, batch.labels_BT, np.int32(NOT_ASKED))
        rest = [jnp.asarray(x[:, start:].T) for x in (batch.ids_BT, batch.pos_BT, labels_BT, after_BT)]
        mask = jnp.asarray([place in frozen for place in self.places])
        return self._second(self.model, before, self.model.init_state(B, T), rest, mask)

    @staticmethod
    def _read(model: LanguageModel, state: Any, tokens: Tokens, prefix_BT: Array | None) -> Any:
        return model.hidden(tokens, state, prefix_BT=prefix_BT).state

    def _step_by_step(self, model: LanguageModel, before: Any, empty: Any, rest: Any, frozen: Array) -> Scores:
        nothing = jax.tree.leaves(empty)

        def token(state: Any, now: Any) -> tuple[Any, Scores]:
            ids_B, pos_B, labels_B, after_B = now
            out = model.hidden(Tokens(ids_B[:, None], pos_B[:, None]), state)
            old, structure = jax.tree.flatten(state)
            kept = []
            for new, was, none, axis, n in zip(
                jax.tree.leaves(out.state), old, nothing, self._axes, self._which, strict=True
            ):
                rows = [1] * axis + [-1] + [1] * (new.ndim - axis - 1)
                held = jnp.where((pos_B == 0).reshape(rows), none, was)
                kept.append(jnp.where((frozen[n] & after_B).reshape(rows), held, new))
            return jax.tree.unflatten(structure, kept), score(model, out.y_BTD, labels_B[:, None])

        _, scores = jax.lax.scan(token, before, tuple(rest))
        return jax.tree.map(lambda x: x[..., 0].T, scores)


def _place(path: Any, stages: int) -> str:
    """The name of a leaf's layer, from where it lies in the model's state."""
    first = path[0].idx
    return NGRAMS if first == stages else ".".join(str(key.idx) for key in path[:3])

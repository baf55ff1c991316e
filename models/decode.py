"""Generation: prompts are read in pieces, then words are drawn one by one; both are the same call with a state.

A bounded model decodes in constant memory at constant speed: the state is carried through a loop inside the compiled
program and donated between calls.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from layers.layer import Tokens
from models.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a word is drawn. temperature 0: the likeliest. top_k: of the k likeliest. top_p: of the fewest words whose
    probabilities reach p (nucleus sampling, arXiv 1904.09751)."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be at least 0 (0: the likeliest word)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def draw(logits_BW: Array, key: Array, sampling: Sampling) -> Array:
    """One word a row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BW, -1).astype(jnp.int32)
    logits = logits_BW / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, -1, descending=True)
        share = jax.nn.softmax(ordered, -1)
        within = jnp.cumsum(share, -1) - share < sampling.top_p  # the word that crosses p is still in
        least = jnp.min(jnp.where(within, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)


ROOM = 256  # memories that grow are given room for a multiple of so many tokens, so that few sizes are compiled


class Decoder:
    """A model made ready to generate. Compiles once for a batch size and, where memories grow, for their room.

    piece: tokens of a prompt read at once. burst: words drawn in one call of the compiled loop (and yielded together).
    """

    def __init__(self, model: LanguageModel, *, piece: int = 64, burst: int = 16):
        if piece < 1 or burst < 1:
            raise ValueError(f"piece is {piece} and burst {burst}: both must be at least 1")
        self.model = jax.jit(LanguageModel.unstacked)(model)
        self.piece, self.burst = piece, burst
        self._leaves, self._treedef = jax.tree.flatten(self.model)
        where = self._leaves[0].sharding
        self._home = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
        self._empty = jax.jit(self.model.init_state, static_argnums=(0, 1))  # each array with memory of its own
        self._read = jax.jit(self._read_piece, donate_argnums=1)
        self._write = jax.jit(self._write_burst, static_argnums=5, donate_argnums=1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        steps: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        *,
        seed: int = 0,
        capacity: int | None = None,
        prefix: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B, n] of new words, n = `burst` at a time, `steps` in all.

        prompts: one or more sequences of ids, of any lengths, each the beginning of a document. capacity: tokens that
        the memories must hold (None: what prompts and steps need, rounded up); only memories that grow with length
        care. prefix: tokens of each prompt that layers with an encoder read ahead, at most all but its last one, which
        speaks; they are read in one piece, of whatever length that takes.

        Raises ValueError, when the first words are asked for, if a prompt is empty or holds an id that is no word, if
        there are no steps, if the capacity is too small or the prefix negative.
        """
        if not len(prompts) or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: give each at least one token, such as the document start")
        W = self.model.config.W
        strange = [word for prompt in prompts for word in prompt if not 0 <= word < W]
        if strange:
            raise ValueError(f"a prompt holds the id {strange[0]}: the model knows 0 to {W - 1}")
        if steps < 1:
            raise ValueError(f"steps is {steps}: it must be at least 1")
        longest = max(map(len, prompts))
        read = -(-longest // self.piece) * self.piece
        if capacity is not None and capacity < longest + steps:
            raise ValueError(
                f"capacity is {capacity}, but the longest prompt and {steps} steps need {longest + steps} tokens"
            )
        # Prompts end together: padding stands before them, where it changes no memory.
        ids = np.zeros([len(prompts), read], np.int32)
        pos = np.full([len(prompts), read], -1, np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, read - len(prompt) :] = prompt
            pos[row, read - len(prompt) :] = np.arange(len(prompt))
        if prefix < 0:
            raise ValueError(f"prefix is {prefix}: it must be at least 0, tokens to read ahead")
        region = (pos >= 0) & (pos < prefix) & (np.arange(read) < read - 1)
        last = int(np.flatnonzero(region.any(0)).max(initial=-1))
        whole = -(-(last + 1) // self.piece) * self.piece
        bursts = -(-steps // self.burst)
        if capacity is None:
            capacity = -(-(longest + bursts * self.burst) // ROOM) * ROOM
        # A whole piece is read at once, although a part of it may be padding.
        # Put where the weights lie: a first call with arrays that lie nowhere in particular would be compiled apart.
        state = jax.device_put(self._empty(len(prompts), max(capacity, whole, self.piece)), self._home)
        logits, cuts = None, [0, *range(whole or self.piece, read + 1, self.piece)]
        for start, stop in itertools.pairwise(cuts):
            piece = Tokens(*(jnp.asarray(x[:, start:stop]) for x in (ids, pos)))
            ahead = (jnp.asarray(region[:, :stop]),) if stop == whole else ()
            state, logits = self._read(self._leaves, state, piece, *ahead)
        place, key = jax.device_put((pos[:, -1] + 1, jax.random.key(seed)), self._home)
        for done in range(0, steps, self.burst):
            state, logits, place, key, words = self._write(self._leaves, state, logits, place, key, sampling)
            yield np.asarray(words)[:, : steps - done]

    def _model(self, leaves: Any) -> LanguageModel:
        return jax.tree.unflatten(self._treedef, leaves)

    def _read_piece(self, leaves: Any, state: Any, tokens: Tokens, prefix_BT: Array | None = None) -> tuple[Any, Array]:
        model = self._model(leaves)
        out = model.hidden(tokens, state, prefix_BT=prefix_BT)
        return out.state, model.logits(out.y_BTD[:, -1])

    def _write_burst(self, leaves: Any, state: Any, logits_BW: Array, place_B: Array, key: Array, sampling: Sampling):
        model = self._model(leaves)

        def word(carry: Any, _: None) -> tuple[Any, Array]:
            state, logits_BW, place_B, key = carry
            key, now = jax.random.split(key)
            ids_B = draw(logits_BW, now, sampling)
            out = model(Tokens(ids_B[:, None], place_B[:, None]), state)
            return (out.state, out.y_BTD[:, 0], place_B + 1, key), ids_B

        carry, words_NB = jax.lax.scan(word, (state, logits_BW, place_B, key), None, length=self.burst)
        return *carry, words_NB.T


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    steps: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    prefix: int = 0,
) -> np.ndarray:
    """All new words at once, int32 [B, steps]. Options as in Decoder.generate."""
    return np.concatenate(list(Decoder(model).generate(prompts, steps, sampling, seed=seed, prefix=prefix)), 1)


def printable(text: str) -> str:
    """A model's text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)

"""Layers broken on purpose, a part at a time: each breaks a law. (broken_layers.py has layers written for that.)"""

import jax.numpy as jnp
import laws
import pytest

from layers import bmojo, chunk_attention, engram, lizard, mixture, product_keys
from layers.layer import LayerConfig, Tokens
from layers.linear import LinearAttention


def unstarted(pos_BT):
    """Documents that go on where others start."""
    return jnp.where(pos_BT == 0, 1, pos_BT)


def across_documents(addresses):
    return lambda self, tokens, before=None: addresses(
        self, Tokens(tokens.ids_BT, unstarted(tokens.pos_BT) + 9), before
    )


def forgets_ids(addresses):
    return lambda self, tokens, before=None: addresses(self, tokens, None)


def places_go_on(places):
    return lambda routed, pos, count: places(routed, unstarted(pos), count)


def unfinished_chunk(places):
    def broken(pos, C, S, before, ends, least):
        at, after, stayed = places(pos, C, S, before, ends, least)
        return at._replace(upto_BT=at.upto_BT + (at.upto_BT * C < S - C).astype(jnp.int32)), after, stayed

    return broken


def told_too_soon(places):
    """A chunk ends before the word with which it should, which only a piece that holds both can know."""

    def broken(pos, C, S, before, ends, least):
        return places(pos, C, S, before, jnp.roll(ends, -1, 1), least)

    return broken


def one_window_apart(number):
    return lambda pos, time, w: number(pos, time, w // 2)


def sees_what_came_before(number):
    return lambda pos, time, start: number(unstarted(pos), time, start)


def normed_over_the_batch(slots):
    """Queries of BatchNorm, as the paper has them."""
    return lambda self, x: slots(self, x / jnp.std(x, (0, 1), keepdims=True))


def gated_by_the_row(fuse):
    return lambda self, x, e: fuse(self, x + jnp.mean(x, 1, keepdims=True), e)


BASE = LinearAttention(H=2, K=4, V=6, chunk=8)
# Sizes that no other test has: what is compiled for a config is shared by whoever has it.
BROKEN = {
    "n-grams of two documents": (
        engram.Engram(W=50, H=1, K=3, rows=40),
        (engram.EngramLayer, "addresses", across_documents),
        "a_document_forgets",
    ),
    "ids are not handed on": (
        engram.Engram(W=50, H=1, K=5, rows=40),
        (engram.EngramLayer, "addresses", forgets_ids),
        "any_cut_of_time",
    ),
    "gates of streams see the row": (
        engram.Engram(W=50, H=1, K=7, rows=40, streams=2),
        (engram.EngramLayer, "fuse", gated_by_the_row),
        "causal",
    ),
    "memories go on at a start": (
        mixture.MixtureOfMemories(BASE, M=2, top=1, shared=False),
        (mixture, "places", places_go_on),
        "a_document_forgets",
    ),
    "a chunk is read before its end": (
        chunk_attention.ChunkAttention(H=2, K=6, chunk=4, top=2, window=3),
        (chunk_attention, "places", unfinished_chunk),
        "causal",
    ),
    "a chunk ends a word too soon": (
        chunk_attention.ChunkAttention(H=2, K=6, chunk=4, top=2, boundary=tuple(range(10)), window=3),
        (chunk_attention, "places", told_too_soon),
        "any_cut_of_time",
    ),
    "documents a window apart": (
        bmojo.BMojoFading(BASE, H=2, K=6, window=6),
        (bmojo, "_number", one_window_apart),
        "a_document_forgets",
    ),
    "an anchor that does not forget": (
        lizard.Lizard(H=2, K=6, window=6, chunk=8),
        (lizard, "number", sees_what_came_before),
        "a_document_forgets",
    ),
    "queries normed over the batch": (
        product_keys.ProductKeyMemory(H=2, keys=5, top=2, K=6, V=8),
        (product_keys.ProductKeyMemoryLayer, "slots", normed_over_the_batch),
        "causal",
    ),
}


SLOW = {"a chunk ends a word too soon"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BROKEN])
def test_a_broken_variant_breaks_a_law(name, monkeypatch):
    config, (owner, part, broken), law = BROKEN[name]
    assert isinstance(config, LayerConfig)
    monkeypatch.setattr(owner, part, broken(getattr(owner, part)))
    with pytest.raises(AssertionError):
        laws.LAWS[law](config)

"""Addresses of n-grams: which rows of a table the last few tokens ask for (Engram, arXiv 2601.07372, section 2).

    mix_n = xor over i < n of (id_{t-i} · a_i)        row_{n,h} = mix_n mod p_{n,h}

id are canonical ids (`canonical`), a_i odd multipliers, drawn once, and p distinct primes, one for each order and head.
Products have up to 63 bits. `rows_on_host` computes with NumPy's int64; `rows` gives the same numbers with 32 bits and
no more, byte by byte, on any device.
"""

import functools
import unicodedata
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

MOST_WORDS = 1 << 20  # ids below it times a byte, and a carry, stay within 32 bits
MOST_ROWS = 1 << 24  # a remainder below it times 256, and a byte, does too


def multipliers(seed: int, layer: int, N: int, words: int) -> tuple[int, ...]:
    """N odd multipliers such that any id below `words` times any of them is below 2^63.

    NumPy does not promise that later releases draw the same numbers: a checkpoint keeps them.
    """
    bound = max(1, (2**63 - 1) // words // 2)
    drawn = np.random.default_rng(seed + 10007 * layer).integers(0, bound, size=N, dtype=np.int64)
    return tuple(2 * int(r) + 1 for r in drawn)


def primes(rows: Sequence[int], heads: int, layers: Sequence[int]) -> dict[int, tuple[tuple[int, ...], ...]]:
    """For each layer and order, `heads` primes from rows[order] on, that no other layer, order or head has."""
    used: set[int] = set()
    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    for layer in layers:
        orders = []
        for least in rows:
            n, mine = least, list[int]()
            while len(mine) < heads:
                if n not in used and _is_prime(n):
                    mine.append(n)
                n += 1
            used.update(mine)
            orders.append(tuple(mine))
        found[layer] = tuple(orders)
    return found


@functools.cache
def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % d for d in range(2, int(n**0.5) + 1))


def rows_on_host(ids_NBT: np.ndarray, multipliers: Sequence[int], primes: Sequence[Sequence[int]]) -> np.ndarray:
    """As `rows`, in int64."""
    found, mix = [], np.zeros(ids_NBT.shape[1:], np.int64)
    for i, a in enumerate(multipliers):
        mix = mix ^ (ids_NBT[i].astype(np.int64) * a)
        if i:
            found += [mix % p for p in primes[i - 1]]
    return np.stack(found, -1).astype(np.int32)


def rows(ids_NBT: Array, multipliers: Sequence[int], primes: Sequence[Sequence[int]]) -> Array:
    """ids_NBT: int32, token t - i at place i. Returns int32 [B, T, orders · heads], all heads of order 2 first."""
    mix: list[Array] = [jnp.zeros(ids_NBT.shape[1:], jnp.uint32)] * 8  # bytes, lowest first
    found = []
    for i, multiplier in enumerate(multipliers):
        carry, word = jnp.zeros_like(mix[0]), ids_NBT[i].astype(jnp.uint32)
        for byte in range(8):
            carry = carry + word * jnp.uint32(multiplier >> (8 * byte) & 255)
            mix[byte] = mix[byte] ^ (carry & jnp.uint32(255))
            carry = carry >> jnp.uint32(8)
        if i:
            for p in primes[i - 1]:
                rest = jnp.zeros_like(carry)
                for digit in reversed(mix):
                    rest = (rest * jnp.uint32(256) + digit) % jnp.uint32(p)
                found.append(rest.astype(jnp.int32))
    return jnp.stack(found, -1)


def canonical(texts: Sequence[str], raw: Sequence[str] | None = None) -> np.ndarray:
    """An id for each text, equal for texts that differ in case, accents, width or white space only; int32, from 0 on.

    texts: what each entry of a vocabulary decodes to. raw: its name in the tokenizer, which stands for itself where
    the text is broken UTF-8. As the public demo of Engram has it, with Python's own Unicode tables.
    """
    ids: dict[str, int] = {}
    keys = [(raw[i] if raw is not None and "\ufffd" in text else _normal(text) or text) for i, text in enumerate(texts)]
    return np.asarray([ids.setdefault(key, len(ids)) for key in keys], np.int32)


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    text = "".join(c.lower() for c in text)  # one by one: str.lower knows a last sigma from others
    parts, blank = [], False
    for c in text:
        if c in " \t\r\n":
            blank = True
            continue
        if blank:
            parts.append(" ")
        parts.append(c)
        blank = False
    text = "".join(parts) + (" " if blank else "")
    if text == " ":
        return " "
    while text and _is_white(text[0]):
        text = text[1:]
    while text and _is_white(text[-1]):
        text = text[:-1]
    return text


def _is_white(c: str) -> bool:
    """Unicode's White_Space: Python's, without the four separators that ASCII has for files, groups, records, units."""
    return c.isspace() and c not in "\x1c\x1d\x1e\x1f"

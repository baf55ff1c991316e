"""What simple models and compressors make of a text: the ladder that a language model's bits per byte stands on."""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 1 << 22
XZ_WINDOW = 8 << 20  # how far preset 6 looks back


def references(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of `held_out`, by name, from the plainest to the strongest.

    "order-0" and "bigram" are the byte and byte-pair frequencies of `train`, each count one higher than seen;
    "zlib" (level 9) and "xz" (preset 6) compress `held_out` alone; "xz after the training text" is what `held_out` adds
    to the compressed last 8 MiB of `train`. Empty where either text is.
    """
    if not train or not held_out:
        return {}
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        alone, together = pool.map(_xz, (train[-XZ_WINDOW:], train[-XZ_WINDOW:] + held_out))
    pairs, asked = _pairs(train) + 1, _pairs(held_out)
    # A byte's own frequency is how often it is the second of a pair; the text's first byte is nobody's second.
    firsts = np.bincount(np.frombuffer(train[:1], np.uint8), minlength=256)
    single = _pairs(train).sum(0) + firsts + 1
    first = np.bincount(np.frombuffer(held_out[:1], np.uint8), minlength=256)
    order0_bits = -np.log2(single / single.sum())
    bigram_bits = -np.log2(pairs / pairs.sum(1, keepdims=True))
    count = len(held_out)
    return {
        "order-0": float(((asked.sum(0) + first) * order0_bits).sum() / count),
        "bigram": float(((asked * bigram_bits).sum() + (first * order0_bits).sum()) / count),
        "zlib": 8 * len(zlib.compress(held_out, 9)) / count,
        "xz": 8 * _xz(held_out) / count,
        "xz after the training text": 8 * (together - alone) / count,
    }


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=6))


def _pairs(text: bytes) -> np.ndarray:
    """How often each byte follows each: [256 before, 256 after], int64."""
    data = np.frombuffer(text, np.uint8)
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(data) - 1, BLOCK):
        block = data[start : start + BLOCK + 1].astype(np.int64)
        counts += np.bincount(block[:-1] << 8 | block[1:], minlength=1 << 16)
    return counts.reshape(256, 256)

"""Tokenizers: bytes, which need nothing, or any Hugging Face `tokenizer.json`.

Both have
    name: str              for people
    digest: str            names the very tokenizer; equal digests give equal tokens
    words: int             entries of the vocabulary
    doc_start: int         the token that precedes each document
    token_bytes_W: int32   bytes of text each token stands for, 0 for specials
    encode(texts) -> list of integer arrays, one a text, without `doc_start`
    decode(ids) -> str
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from training.data import DataError


class Tokenizer(Protocol):
    name: str
    digest: str
    words: int
    doc_start: int
    token_bytes_W: np.ndarray

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: np.ndarray) -> str: ...


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256 starts a document."""

    name = "bytes"
    digest = "bytes-1"
    words = 257
    doc_start = 256

    def __init__(self):
        self.token_bytes_W = np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, through the `tokenizers` package.

    Its own beginning (or end) of text starts a document; where it has none, one entry is added after its vocabulary.
    Long texts are encoded in pieces of a MiB, cut where a line ends, so that memory stays bounded.
    """

    STARTS = ("<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>", "[BOS]", "[CLS]", "</s>")
    PIECE = 1 << 20

    def __init__(self, path: Path, name: str | None = None):
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"Text.tokenizer is {str(path)!r}: run pip install tokenizers to read it") from None
        remedy = "give 'bytes' or the path of a Hugging Face tokenizer.json"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"Text.tokenizer is {str(path)!r}: cannot be read ({error.strerror}); {remedy}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
            spec = json.loads(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            reason = str(error).splitlines()[0]
            raise DataError(f"Text.tokenizer is {str(path)!r}: not a tokenizer ({reason}); {remedy}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = name or path.name
        self.text = text
        self.digest = hashlib.sha256(text).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        words = max(vocabulary.values(), default=-1) + 1
        own = [vocabulary[start] for start in self.STARTS if start in vocabulary]
        self.doc_start = own[0] if own else words
        self.words = max(words, self.doc_start + 1)
        self.token_bytes_W = _token_bytes(spec, vocabulary, self.words)
        self.token_bytes_W[self.doc_start] = 0  # not every file marks it as special

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [_pieces(text, self.PIECE) for text in texts]
        encoded = self._tokenizer.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False)
        ids = iter([np.asarray(e.ids, np.int64) for e in encoded])
        return [np.concatenate([next(ids) for _ in ps] or [np.zeros(0, np.int64)]) for ps in pieces]

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return self._tokenizer.decode(ids[(ids != self.doc_start) & (ids >= 0) & (ids < self.words)].tolist())


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer in a file. Raises DataError, one line, where there is none."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name).expanduser())


def _pieces(text: str, size: int) -> list[str]:
    pieces, first = [], 0
    while first < len(text):
        last = text.find("\n", first + size) + 1
        if last == 0 or len(text) - last < size // 8:
            last = len(text)
        pieces.append(text[first:last])
        first = last
    return pieces


def _token_bytes(spec: dict, vocabulary: dict[str, int], words: int) -> np.ndarray:
    """Bytes of text each entry stands for, from how the tokenizer writes its entries.

    Byte-level entries spell a byte a character; WordPiece marks what continues a word by ##; SentencePiece writes a
    space as U+2581 and lone bytes as <0x..>. Specials stand for none.
    """
    text = json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    byte_level = '"ByteLevel"' in text
    added = {token["content"]: token for token in spec.get("added_tokens") or ()}
    prefix = spec["model"].get("continuing_subword_prefix") if spec["model"].get("type") == "WordPiece" else None
    token_bytes_W = np.zeros(words, np.int32)
    for token, index in vocabulary.items():
        if token in added:
            size = 0 if added[token].get("special") else len(token.encode())
        elif byte_level:
            size = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            size = 1
        elif prefix is not None:
            # A word that does not continue another had a space before it.
            size = len(token.removeprefix(prefix).encode()) + (not token.startswith(prefix))
        else:
            size = len(token.replace("\u2581", " ").encode())
        token_bytes_W[index] = size
    return token_bytes_W

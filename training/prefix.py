"""Text of which each row's beginning is read ahead, some of its tokens hidden: the data of JRT-RNN (arXiv 2407.05483).

The region is the first `prefix` tokens of a row, up to where another document starts. In training each of its tokens
is hidden with probability `masked`, behind a word of its own, and asked at its place; after the region the next token
is asked, as ever. Nothing is hidden in held-out text, which asks after the region alone.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from training.data import NOT_ASKED, Batch, DataError, Dataset, Text, TextDataset
from training.store import prepare


@dataclasses.dataclass(frozen=True)
class PrefixText(Text):
    """Text, packed, with a region at the beginning of each row.

    prefix: tokens of the region. masked: probability that a token of it is hidden.
    """

    prefix: int = 128
    masked: float = 0.15

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.prefix < self.T:
            raise DataError(f"PrefixText.prefix is {self.prefix}: it must be at least 1 and below T = {self.T}")
        if not 0 <= self.masked < 1:
            raise DataError(f"PrefixText.masked is {self.masked}: give a probability, at least 0 and below 1")

    def build(self) -> "PrefixTextDataset":
        return PrefixTextDataset(self)

    def outline(self, words: int) -> Dataset:
        data = super().outline(words)
        data.prefix = self.prefix
        return data


class PrefixTextDataset(TextDataset):
    """Batches of a PrefixText config. hidden: the word, after the tokenizer's, that stands for a hidden token."""

    config: PrefixText

    def __init__(self, config: PrefixText):
        super().__init__(config, prepare(config))
        self.prefix, self.hidden = config.prefix, self.words
        self.words += 1
        self.token_bytes = np.append(self.token_bytes, np.int32(0))

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        config, batch = self.config, super().batch(seed, step, rows)
        region_BT = self._region(batch)
        # Drawn for the whole batch, so that a row's are the same whoever reads it.
        drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, config.prefix])))
        chosen_BT = drawn.random((config.B, config.T), np.float32)[rows or slice(None)] < config.masked
        hidden_BT = region_BT & chosen_BT & (batch.ids_BT != self.doc_start)
        after_BT = np.where(region_BT, np.int32(NOT_ASKED), batch.labels_BT)
        ids_BT = np.where(hidden_BT, np.int32(self.hidden), batch.ids_BT)
        return Batch(ids_BT, batch.pos_BT, np.where(hidden_BT, batch.ids_BT, after_BT), region_BT)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        for batch in super().held_out(batches, rows):
            region_BT = self._region(batch)
            labels_BT = np.where(region_BT, np.int32(NOT_ASKED), batch.labels_BT)
            yield Batch(batch.ids_BT, batch.pos_BT, labels_BT, region_BT)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids)
        return super().decode(ids[ids != self.hidden])

    def _region(self, batch: Batch) -> np.ndarray:
        place_T = np.arange(batch.ids_BT.shape[1])
        later_BT = np.cumsum((batch.pos_BT == 0) & (place_T > 0), 1) > 0  # of documents that start within the row
        return (place_T < self.config.prefix) & (batch.pos_BT >= 0) & ~later_BT

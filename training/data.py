"""Data: what a batch is, where batches come from, and the text a language model trains on.

Every batch is a pure function of (seed, step): the data's state is one integer, a run resumes anywhere, and any number
of processes reads the same global batch, each its own rows.

    python -m training.data prepare notes/ --tokenizer tokenizer.json     writes a token store and prints what is in it
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from training.store import Store

NOT_ASKED = -100
STEPS = 1 << 40


class DataError(ValueError):
    """Data that cannot be used: one line that names the field, its value and what would be right."""


class Batch(NamedTuple):
    """ids_BT, pos_BT, labels_BT: int32. A label is the token to say at its place, -100 where none is asked.

    A place counts from the document's start, or from the row's where the document began before it: at 0 every memory
    forgets. It is -1 at padding.
    prefix_BT: bool, tokens of a region that is read ahead (models.lm); None for none. A label within it is the token at
    its own place, which ids_BT hides.
    """

    ids_BT: np.ndarray
    pos_BT: np.ndarray
    labels_BT: np.ndarray
    prefix_BT: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data on paper: B rows of T tokens a step."""

    T: int
    B: int

    def __post_init__(self):
        for field in ("T", "B"):
            if getattr(self, field) < 1:
                raise DataError(f"{type(self).__name__}.{field} is {getattr(self, field)}: it must be at least 1")

    def build(self) -> "Dataset":
        raise NotImplementedError

    def outline(self, words: int) -> "Dataset":
        """What a program is built from: words, token_bytes, labelled and prefix, without batches. Reads no file, so
        that there need be none. words: of the vocabulary, where only a file would say."""
        return self.build()


class Dataset:
    """Where batches come from. A subclass sets the attributes and defines `batch` and `held_out`.

    words: size of the vocabulary.
    digest: sha256 of what the batches are made of.
    labelled: labels in every row, where that is constant.
    token_bytes: int32 [words], bytes of text each token stands for, 0 for specials.
    doc_start: the token that starts a document, if there is one.
    prefix: tokens at the beginning of a row that are read ahead; 0 for none.
    """

    config: DataConfig
    words: int
    digest: str
    labelled: int | None = None
    token_bytes: np.ndarray
    doc_start: int | None = None
    prefix: int = 0

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        """The rows (all of them for None) of the global batch of a step: a pure function of its arguments."""
        raise NotImplementedError

    def places(self, seed: int, step: int) -> list[int]:
        """Where the rows of that batch come from, for a person who looks for them; [] if from no file."""
        return []

    def train(self, seed: int, rows: slice | None = None) -> Any:
        """A grain.MapDataset: ds[step] for step in [0, 2**40) is the global batch, or the given rows of it."""
        import grain  # imports jax

        return grain.MapDataset.source(_Steps(self, seed, rows))

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """The batches never trained on, always the same; `batches` bounds how many, `rows` picks rows of each."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], without a document start."""
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        """The text of some tokens; document starts are left out."""
        raise NotImplementedError

    def references(self) -> dict[str, float]:
        """Bits per byte that others reach on the held-out text, by name; empty where bits per byte mean nothing."""
        return {}


class _Steps:
    """Batches by step: grain's random-access source."""

    def __init__(self, dataset: Dataset, seed: int, rows: slice | None):
        self._dataset, self._seed, self._rows = dataset, seed, rows

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        return self._dataset.batch(self._seed, int(step), self._rows)


@dataclasses.dataclass(frozen=True)
class Text(DataConfig):
    """Text, packed: documents follow each other, each after a document-start token.

    source: `stdlib` (this interpreter's own sources), `wheels` (the sources of jax and its kin), or a file, folder or
        glob of text, .jsonl, .parquet or .arrayrecord, or a prepared store.
    tokenizer: `bytes`, or the path of a Hugging Face tokenizer.json. A prepared store brings its own.
    held_out: fraction of the documents, drawn by their names, never trained on (of a single document: its end).
    shuffle: visit the windows of an epoch in random order, from a random phase; otherwise as they come.
    store: folder of the prepared stores; None for .cache/data in the repository.
    text_field: where rows of .jsonl, .parquet and .arrayrecord keep their text.
    """

    T: int = 256
    B: int = 16
    source: str = "stdlib"
    tokenizer: str = "bytes"
    held_out: float = 0.05
    shuffle: bool = True
    store: str | None = None
    text_field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise DataError(f"Text.held_out is {self.held_out}: give a fraction, at least 0 and below 1")
        if not self.source:
            raise DataError("Text.source is empty: give stdlib, wheels, or a path")

    def build(self) -> "TextDataset":
        from training.store import prepare

        return TextDataset(self, prepare(self))

    def outline(self, words: int) -> Dataset:
        data = Dataset()
        data.words, data.token_bytes = words, np.ones(words, np.int32)
        return data


class TextDataset(Dataset):
    """Windows of T tokens over a token store.

    The training tokens form a ring. Epoch e cuts it from a phase of its own into windows and visits them in an order of
    its own; row b of step s is window s * B + b of that endless sequence.
    """

    config: Text

    def __init__(self, config: Text, store: "Store"):
        self.config, self.store = config, store
        tokenizer = store.tokenizer
        self.words = tokenizer.words
        self.doc_start = tokenizer.doc_start
        self.token_bytes = tokenizer.token_bytes_W
        self.digest = store.digest
        self._windows = len(store.train) // config.T  # in an epoch
        if self._windows == 0:
            count = len(store.train)
            raise DataError(f"Text.T is {config.T}: longer than the corpus, {count} training tokens; give at most that")
        if self._windows > 1 << 32:
            least = -(-len(store.train) >> 32)
            raise DataError(f"Text.T is {config.T}: too many windows for so large a corpus; give at least {least}")

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        tokens_N, T = self.store.train, self.config.T
        starts_B = np.asarray(self.places(seed, step), np.int64)[rows or slice(None)]
        places_BT = starts_B[:, None] + np.arange(T + 1)
        return self._pack(np.take(tokens_N, places_BT, mode="wrap").astype(np.int32))

    def places(self, seed: int, step: int) -> list[int]:
        """The first token of each row, in the ring of the training tokens (train.tokens of the store)."""
        windows = range(step * self.config.B, (step + 1) * self.config.B)
        return [self._start(seed, window) % len(self.store.train) for window in windows]

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """Consecutive windows that do not overlap, the last batch padded; fewer `batches` are spread over the text."""
        tokens_N, (B, T) = self.store.held_out, (self.config.B, self.config.T)
        total = -(-len(tokens_N) // (B * T))
        count = total if batches is None else min(batches, total)
        for index in range(count):
            windows_B = np.arange(B)[rows or slice(None)] + index * total // count * B
            places_BT = windows_B[:, None] * T + np.arange(T + 1)
            window_BT = np.take(tokens_N, places_BT, mode="clip").astype(np.int32)
            yield self._pack(np.where(places_BT < len(tokens_N), window_BT, -1))

    def encode(self, text: str) -> np.ndarray:
        return self.store.tokenizer.encode([text])[0].astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self.store.tokenizer.decode(np.asarray(ids))

    def references(self) -> dict[str, float]:
        return self.store.references()

    def _start(self, seed: int, window: int) -> int:
        """Where in the ring the n-th window of the endless sequence starts."""
        epoch, index = divmod(window, self._windows)
        if not self.config.shuffle:
            return index * self.config.T
        shuffle_seed, phase = _epoch(seed, epoch, len(self.store.train))
        index = _index_shuffle()(index, max_index=self._windows - 1, seed=shuffle_seed, rounds=4)
        return phase + index * self.config.T

    def _pack(self, window_BT: np.ndarray) -> Batch:
        """From T + 1 tokens a row, -1 for padding, to a batch."""
        is_start_BT = window_BT == self.doc_start
        is_padding_BT = window_BT < 0
        ids_BT = np.maximum(window_BT[:, :-1], 0)
        labels_BT = np.where(is_start_BT[:, 1:] | is_padding_BT[:, 1:], np.int32(NOT_ASKED), window_BT[:, 1:])
        place_T = np.arange(ids_BT.shape[1], dtype=np.int32)
        started_BT = np.maximum.accumulate(np.where(is_start_BT[:, :-1], place_T, np.int32(0)), axis=1)
        pos_BT = np.where(is_padding_BT[:, :-1], np.int32(-1), place_T - started_BT)
        return Batch(ids_BT, pos_BT, labels_BT)


@functools.cache
def _index_shuffle() -> Any:
    from grain.experimental import index_shuffle  # imports jax

    return index_shuffle


@functools.lru_cache(64)
def _epoch(seed: int, epoch: int, tokens: int) -> tuple[int, int]:
    """The seed of an epoch's order, 32 bits, and its phase in [0, tokens)."""
    order, phase = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    return int(order) >> 32, int(phase) % tokens


def _main() -> None:
    import tyro
    from rich.console import Console
    from rich.table import Table

    def show(store: "Store") -> None:
        manifest = store.manifest
        table = Table("", "documents", "tokens", "bytes", title=manifest["source"], title_justify="left")
        for name, split in manifest["splits"].items():
            table.add_row(name, *(f"{split[field]:,}" for field in ("documents", "tokens", "bytes")))
        console = Console()
        console.print(table)
        tokenizer = manifest["tokenizer"]
        console.print(f"tokenizer  {tokenizer['name']}, {tokenizer['words']:,} words", highlight=False)
        console.print(f"digest     {store.digest}", highlight=False)
        console.print(f"folder     {store.folder}", highlight=False, soft_wrap=True)

    def prepare(
        source: tyro.conf.Positional[str] = "stdlib",
        tokenizer: str = "bytes",
        held_out: float = 0.05,
        store: str | None = None,
        text_field: str = "text",
        references: bool = False,
    ) -> None:
        """Writes the token store of a source, or finds it, and prints what is in it.

        Args:
            source: stdlib, wheels, or a file, folder or glob of text, .jsonl, .parquet or .arrayrecord.
            tokenizer: bytes, or the path of a Hugging Face tokenizer.json.
            held_out: Fraction of the documents that is never trained on.
            store: Folder of the prepared stores; .cache/data in the repository by default.
            text_field: Where rows of .jsonl, .parquet and .arrayrecord keep their text.
            references: Also print what simple models and compressors reach on the held-out text.
        """
        from training.store import prepare as prepare_store

        config = Text(source=source, tokenizer=tokenizer, held_out=held_out, store=store, text_field=text_field)
        prepared = prepare_store(config)
        show(prepared)
        for name, bits in prepared.references().items() if references else ():
            print(f"{bits:.3f} bits per byte  {name}")

    try:
        tyro.extras.subcommand_cli_from_dict(
            {"prepare": prepare}, prog="python -m training.data", description="Prepares text for training."
        )
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    from training.data import _main as main  # so that its classes are those that the other modules import

    main()

"""Recall in a language model's own terms: held-out text read twice. What was read once should be known the second time.

A row is a document start, a passage of n tokens, and the same passage again. A model without memory predicts both
alike; one that recalls predicts the second far better, as long as n tokens fit in what it remembers.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from layers.layer import Tokens
from models.lm import LanguageModel
from training.data import Dataset


@dataclasses.dataclass(frozen=True)
class Reading:
    """distance: tokens between a token and its repetition. first, second: accuracy at the first and second reading.

    gain: nats a token that the first reading saves the second. standard_error: of `second`, over rows.
    """

    distance: int
    first: float
    second: float
    standard_error: float
    gain: float
    rows: int


def read_twice(
    model: LanguageModel, dataset: Dataset, distances: Sequence[int] = (16, 32, 64, 128, 256, 512), rows: int = 16
) -> list[Reading]:
    """One Reading a distance, on the same number of rows, from passages spread over the held-out text."""
    texts = [batch.ids_BT for batch in dataset.held_out()]
    stream = np.concatenate([np.ravel(x) for x in texts])
    start = dataset.doc_start
    stream = stream if start is None else stream[stream != start]

    @jax.jit
    def judge(model: LanguageModel, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        pos = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1, dtype=jnp.int32), ids[:, :-1].shape)
        logits = model(Tokens(ids[:, :-1], pos)).y_BTD
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1)[..., 0]
        return jnp.argmax(logits, -1) == ids[:, 1:], -chosen

    readings = []
    for n in distances:
        if len(stream) < rows * n:
            break
        places = np.linspace(0, len(stream) - n, rows).astype(int)
        passages = np.stack([stream[p : p + n] for p in places]).astype(np.int32)
        row = np.concatenate([passages, passages], 1)
        lead = 0 if start is None else 1
        if lead:
            row = np.concatenate([np.full([rows, 1], start, np.int32), row], 1)
        right, nll = (np.asarray(x, np.float64) for x in judge(model, jnp.asarray(row)))
        # Column t predicts token t + 1. The first token of either reading is nobody's to know: both leave it out.
        one, two = slice(lead, lead + n - 1), slice(lead + n, lead + 2 * n - 1)
        second = right[:, two].mean(1)
        readings.append(
            Reading(
                n,
                float(right[:, one].mean()),
                float(second.mean()),
                float(second.std(ddof=1) / np.sqrt(rows)),
                float(nll[:, one].mean() - nll[:, two].mean()),
                rows,
            )
        )
    return readings

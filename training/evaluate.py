"""Held-out evaluation: sums over batches on the device, one small table on the host."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from models.parameters import Params
from training.data import Batch
from training.step import LOG2


def evaluate(step: Callable[[Params, Any], dict[str, Any]], params: Params, batches: Iterable[Batch]) -> dict:
    """loss (nats a token), bits_per_byte, perplexity, accuracy over all that is asked, and `nll_by_position` [T]."""
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = jax.device_get(step(params, batch))
        for name, value in sums.items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    if not total or total["asked"].sum() == 0:
        raise ValueError("nothing to evaluate on: the held-out data asks nothing; raise data.held_out")
    asked = total["asked"].sum()
    loss = float(total["nll"].sum() / asked)
    by_position = np.divide(total["nll"], total["asked"], out=np.zeros_like(total["nll"]), where=total["asked"] > 0)
    with np.errstate(over="ignore"):  # a model that has just blown up
        perplexity = float(np.exp(loss))
    result = {"loss": loss, "perplexity": perplexity, "accuracy": float(total["correct"].sum() / asked)}
    if total["bytes"].sum() > 0:
        result["bits_per_byte"] = float(total["nll"].sum() / LOG2 / total["bytes"].sum())
    return result | {"nll_by_position": [float(x) for x in by_position]}

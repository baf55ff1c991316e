"""What a study's arms are measured by: questions of a probe, or held-out text."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from probes.evaluation import Answer, evaluate, mean_accuracy
from probes.tasks import draws
from probes.tasks.task import Part, ProbeData, Task
from training.data import Batch, Dataset
from training.settings import ConfigError
from training.step import LOG2

VALIDATION = 128  # rows of each law that is trained on, but of other seeds


class Said(NamedTuple):
    """value: the measure over all test rows. scores: by slice, as JSON (Score.json); none for text."""

    value: float
    scores: list[dict[str, Any]]


class Judge(Protocol):
    """measure: what it is called. higher: whether more of it is better."""

    measure: str
    higher: bool

    def validate(self, answers: Answer) -> float:
        """Of rows that are neither trained on nor tested: what settings are chosen by."""
        ...

    def test(self, answers: Answer) -> Said: ...


def _answers_alone(law: Any) -> Task:
    """A law that trains on every next token, as MAD does, is judged by its answers: the others are guesses."""
    return dataclasses.replace(law, targets="asked") if getattr(law, "targets", "asked") == "all" else law


class ByQuestions:
    """Accuracy of a probe, the mean over its slices."""

    measure, higher = "accuracy", True

    def __init__(self, data: ProbeData):
        config = data.config
        self._tests, self._labelled = config.test, data.labelled
        laws = list(dict.fromkeys(_answers_alone(part.task) for part in config.train))
        self._validation = [(Part(law, VALIDATION), draws.fold(law.test_seed(), 1)) for law in laws]

    def validate(self, answers: Answer) -> float:
        scores = [evaluate(answers, [part], seed, labelled=self._labelled)[0] for part, seed in self._validation]
        return mean_accuracy(scores)

    def test(self, answers: Answer) -> Said:
        scores = evaluate(answers, self._tests, labelled=self._labelled)
        return Said(mean_accuracy(scores), [score.json() for score in scores])


class ByText:
    """Bits per byte of held-out text: settings are chosen by every other batch, and tested by those between."""

    measure, higher = "bits per byte", False

    def __init__(self, data: Dataset, batches: int | None):
        every = list(data.held_out(batches))
        if len(every) < 2:
            raise ConfigError(
                f"a study needs at least 2 held-out batches, one to choose by and one to test, and has {len(every)}: "
                "raise train.eval_batches or data.held_out, or lower data.B"
            )
        self._validation, self._tests = every[0::2], every[1::2]
        self._bytes = data.token_bytes

    def _bits(self, answers: Answer, batches: list[Batch]) -> float:
        nats = count = 0.0
        for batch in batches:
            nats += float(np.sum(np.asarray(answers(batch, None)[1]), dtype=np.float64))
            count += float(self._bytes[np.maximum(batch.labels_BT, 0)][batch.labels_BT >= 0].sum())
        return nats / LOG2 / count

    def validate(self, answers: Answer) -> float:
        return self._bits(answers, self._validation)

    def test(self, answers: Answer) -> Said:
        return Said(self._bits(answers, self._tests), [])


def judge(data: Dataset, batches: int | None) -> Judge:
    """batches: of held-out text, at most; None for all."""
    if isinstance(data, ProbeData):
        return ByQuestions(data)
    if not data.token_bytes.any():
        raise ConfigError(f"a study trains on a Probe or on text, not on {type(data.config).__name__}")
    return ByText(data, batches)

"""MAD (Poli et al. 2024, arXiv 2403.17844): six small tasks, one setting of each varied in one thing at a time.

    mad_recall    in_context.py      mad_copy      selective_copy.py
    mad_noisy     in_context.py      mad_compress  compression.py
    mad_fuzzy     fuzzy.py           mad_memorize  memorize.py

NAME@paper is the published baseline, `sweep` all 66 settings. Published: two blocks of mixer and SwiGLU at width 128
(RMS norms, heads of 8, no position embedding), 200 epochs in batches of 128, AdamW with a cosine to 1e-6, the best of
learning rates 1e-4, 5e-4 and 1e-3 (5e-4 here) and of weight decay 0 and 0.1; 1,280 rows to test on. A task's score is
the mean over its settings, and MAD's score the mean over tasks. Its accuracy is balanced: the share right of each
answer, averaged over answers (within each batch). At @paper recall, noisy and fuzzy train on every next token, as MAD
does, and are asked for answers alone.

Percent, as the paper on DeltaNet (Yang et al. 2024, arXiv 2406.06484) prints them; Hyena, DeltaNet and Mamba have short
convolutions, GLA none:

                    compress  fuzzy  recall  memorize  noisy   copy   mean
    Transformer         51.6   29.8    94.1      85.2   86.8   99.6   74.5
    Hyena               45.2    7.9    81.7      89.5   78.8   93.1   66.0
    Hyena, many heads   44.8   14.4    99.0      89.4   98.6   93.0   73.2
    Mamba               52.7    6.7    90.4      89.5   90.1   86.3   69.3
    GLA                 38.8    6.9    80.8      63.3   81.6   88.6   60.0
    DeltaNet            42.2   35.7   100        52.8  100    100     71.8

Goals, at which steps are counted, are what some of these reach: 0.5 of compress, 0.35 of fuzzy, 0.85 of memorize and
0.99 of the others, at the smaller sizes too.

Another laboratory (MetaLA's appendix) has GLA at 91.6 in recall, 11 points above: one seed says little.
"""

import dataclasses
from typing import Any

from probes.tasks.compression import Compression
from probes.tasks.fuzzy import Fuzzy
from probes.tasks.in_context import InContext
from probes.tasks.memorize import Memorize
from probes.tasks.selective_copy import SelectiveCopy
from probes.tasks.task import Part, Probe, Task, Trial

_GOALS = {Compression: 0.5, Fuzzy: 0.35, Memorize: 0.85}
NOISY = InContext(vocab=32, noise=0.2, noise_words=16)

# What is trained on, and what is asked; rows to train on; what is varied, by field.
_ROWS = (6_400, 3_200, 1_600, 800)
_LENGTHS = (256, 512, 1024)
_VOCABS = (32, 64, 128)
PUBLISHED: dict[str, tuple[Task, Task, int, dict[str, tuple[Any, ...]]]] = {
    "mad_recall": (
        InContext(targets="all"),
        InContext(),
        12_800,
        {"vocab": _VOCABS, "length": _LENGTHS, "rows": _ROWS},
    ),
    "mad_fuzzy": (
        Fuzzy(targets="all"),
        Fuzzy(shortest=3),
        12_800,
        {"vocab": _VOCABS, "length": _LENGTHS, "rows": _ROWS},
    ),
    "mad_noisy": (
        dataclasses.replace(NOISY, targets="all"),
        NOISY,
        12_800,
        {"vocab": (48, 80, 144), "length": _LENGTHS, "rows": _ROWS, "noise": (0.4, 0.6, 0.8)},
    ),
    "mad_copy": (
        SelectiveCopy(blanks="before"),
        SelectiveCopy(blanks="before"),
        12_800,
        {"vocab": _VOCABS, "length": (512, 1024), "rows": _ROWS, "tokens": (32, 64, 96)},
    ),
    "mad_compress": (
        Compression(),
        Compression(),
        12_800,
        {"vocab": _VOCABS, "length": (64, 128, 256), "rows": _ROWS},
    ),
    "mad_memorize": (Memorize(), Memorize(), 256, {"vocab": (512, 1024, 2048, 4096, 8192)}),
}


def _published(train: Task, test: Task, rows: int) -> Trial:
    data = Probe(B=128, train=(Part(train, rows),), test=(Part(test, 1_280),))
    watched = _changed(train, "targets", "asked") if hasattr(train, "targets") else None
    return Trial(
        data,
        steps=200 * -(-rows // 128),
        lr=5e-4,
        D=128,
        blocks=2,
        conv=False,
        mlp=True,
        goal=_GOALS.get(type(test), 0.99),
        about=_about(test),
        watched=watched,
    )


def _about(law: Task) -> str:
    """Of the two tasks that share a file."""
    if not isinstance(law, InContext):
        return ""
    return f"In-context recall{' among noise' if law.noise else ''}, one of MAD's tasks (Poli et al. 2024)."


def sweep() -> dict[str, Trial]:
    """All 66 published settings: each baseline by its name, the others as NAME@FIELD=VALUE."""
    trials = {}
    for name, (train, test, rows, changes) in PUBLISHED.items():
        trials[name] = _published(train, test, rows)
        for field, values in changes.items():
            for value in values:
                if field == "rows":
                    trial = _published(train, test, value)
                else:
                    trial = _published(_changed(train, field, value), _changed(test, field, value), rows)
                trials[f"{name}@{field}={value}"] = trial
    return trials


def _changed(law: Any, field: str, value: Any) -> Any:
    return dataclasses.replace(law, **{field: value})


def _small(law: Any, *changes: dict[str, Any], rows: int = 12_800, asked: int = 512, **trial: Any) -> Trial:
    """Trained on a law, and asked by it and its changes."""
    tests = (law, *(dataclasses.replace(law, **change) for change in changes))
    data = Probe(B=64, train=(Part(law, rows),), test=tuple(Part(test, asked) for test in tests))
    return Trial(data, mlp=True, goal=_GOALS.get(type(law), 0.99), about=_about(law), **trial)


_SHORT_NOISY = dataclasses.replace(NOISY, length=64)
_SHORT_FUZZY = Fuzzy(length=64, key=2, value=2)

trials = {
    "mad_recall": _small(InContext(length=64), *({"length": L} for L in (128, 256, 512)), steps=1_000),
    "mad_recall@smoke": _small(InContext(length=32), rows=1_280, asked=128, steps=300),
    "mad_noisy": _small(
        _SHORT_NOISY, {"length": 128}, {"length": 256}, {"length": 512}, {"noise": 0.4}, {"noise": 0.8}, steps=1_000
    ),
    "mad_noisy@smoke": _small(dataclasses.replace(NOISY, length=32), rows=1_280, asked=128, steps=300),
    "mad_fuzzy": _small(
        _SHORT_FUZZY, {"shortest": 2}, {"length": 128}, {"length": 256}, {"length": 512}, steps=1_000, blocks=2
    ),
    "mad_fuzzy@smoke": _small(Fuzzy(vocab=8, length=32, key=2, value=2), rows=1_280, asked=128, steps=300),
    "mad_copy": _small(
        SelectiveCopy(length=64, tokens=8),
        {"length": 128},
        {"length": 256},
        {"length": 512},
        {"length": 128, "tokens": 16},
        steps=1_000,
        blocks=2,  # attention stays at 0.45 with one
    ),
    "mad_copy@smoke": _small(SelectiveCopy(vocab=8, length=24, tokens=4), rows=1_280, asked=128, steps=300),
    "mad_compress": _small(Compression(), {"length": 64}, steps=2_000),
    "mad_compress@smoke": _small(Compression(vocab=8, length=8), rows=1_280, asked=128, steps=300),
    "mad_memorize": _small(Memorize(), {"length": 128}, rows=256, steps=2_000),
    "mad_memorize@smoke": _small(Memorize(vocab=32, length=16), rows=128, asked=128, steps=300),
} | {f"{name}@paper": _published(train, test, rows) for name, (train, test, rows, _) in PUBLISHED.items()}

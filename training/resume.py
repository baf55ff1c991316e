"""What a run goes on from: the checkpoints of a folder, what they say of themselves, and what must be the same."""

import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from training import settings
from training.checkpoint import CheckpointError
from training.data import Dataset, TextDataset
from training.digests import META, DamagedError
from training.experiment import Experiment

# Fields of a checkpoint's config that may be others when a run is resumed: none that says what is learnt, or from what.
MAY_CHANGE = (
    "description", "parameters", "sample", "pod", "data.store", "mesh.", "model.remat", "model.scan_layers", "train.",
)  # fmt: skip
MAY_NOT = ("train.seed", "train.ema", "train.accumulate", "train.clip", "train.z_loss", "train.masked")


def source_of(run: Path, resume: str) -> Path | None:
    """The run to go on from: this one, another, or None for none."""
    if resume == "never" and _has_checkpoints(run):
        raise CheckpointError(f"{run} already holds a run: use --resume auto to go on with it, or another --run")
    if resume == "never":
        return None
    source = run if resume == "auto" or _has_checkpoints(run) else Path(resume)
    if resume != "auto" and not _has_checkpoints(source):
        raise CheckpointError(f"--resume {resume}: give auto, never, or the folder of a run with checkpoints")
    return source


def _has_checkpoints(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def refuse_another(
    experiment: Experiment, dataset: Dataset, source: Path | None, step: int, meta: dict[str, Any]
) -> None:
    """Raises, by the name of what differs, where a checkpoint is of another run than the one that would go on.

    What it was made with it says itself: RUN/config.py is whatever somebody has written there since. Where it does not,
    it is damaged.
    """
    try:
        changes, digest = settings.changes(meta["config"], experiment), str(meta["digest"])
        kept = {place: dict(said) for place, said in meta.get("constants", {}).items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise DamagedError(f"{META} does not say what its run was made of") from None
    other = [
        f"{field} = {old}, not {new}"
        for field, old, new in changes
        if field.startswith(MAY_NOT) or not field.startswith(MAY_CHANGE)
    ]
    if other:
        raise settings.ConfigError(
            f"{source} was made with {', '.join(other)}: change that back, or choose another --run"
        )
    if digest != dataset.digest:
        place = ""
        if isinstance(dataset, TextDataset):
            place = f" of the store {dataset.store.folder}, made from {dataset.store.manifest['source']}"
        raise CheckpointError(
            f"the data has changed since step {step} was saved (digest {digest[:12]}, now "
            f"{dataset.digest[:12]}{place}): the run cannot go on with the same batches; start another --run"
        )
    now = _constants(experiment)
    for place in sorted(kept.keys() | now.keys()):
        if kept.get(place) != now.get(place):
            old, new = kept.get(place, {}), now.get(place, {})
            name = next(name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
            raise CheckpointError(
                f"{source} was trained with model.{place}: {name} = {old.get(name)}, and now that is {new.get(name)}, "
                "so its tables would be read at other rows: give the layer the old ones, or start another --run"
            )


def record_of(experiment: Experiment, dataset: Dataset, step: int) -> dict[str, Any]:
    """What the checkpoint of a step says of itself."""
    import flax

    return {
        "step": step,
        "seed": experiment.train.seed,
        "digest": dataset.digest,
        "config": settings.render(experiment),
        "constants": _constants(experiment),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
        },
    }


def _constants(experiment: Experiment) -> dict[str, Any]:
    """What layers compute with besides config and parameters, by their place in the model."""
    ngrams = experiment.model.ngrams
    return ({} if ngrams is None else {"ngrams": ngrams.constants()}) | {
        f"stages.{s}.pattern.{i}": said
        for s, stage in enumerate(experiment.model.stages)
        for i, layer in enumerate(stage.pattern)
        if (said := layer.constants())
    }

"""Trains a config: python train.py quickstart --train.steps 500. `python train.py --help` lists the configs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any


def _overview() -> str:
    from training.settings import config_files, describe

    lines = [f"  {name:24}{describe(path)}" for name, path in config_files().items()]
    return (
        "usage: python train.py CONFIG [--run FOLDER] [--resume auto|never|RUN] [--dry-run] [--field value ...]\n\n"
        "Trains a language model from a config: a name below, a .py file, or a run folder (its saved config).\n"
        "The same command goes on with a run that was stopped or killed.\n\n"
        "configs:\n" + "\n".join(lines) + "\n\n"
        "  python train.py CONFIG --help        every field of a config with its meaning and default\n"
        "  python train.py CONFIG --dry-run     its layers, parameters, state and compute, without training\n"
        "  python train.py quickstart --model.D 128 --train.steps 200 --run runs/small"
    )


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0].startswith("-"):
        return _fail(f"the first argument is a config, not {arguments[0]!r}: see python train.py --help")
    from training.settings import ConfigError, load, locate

    try:
        path = locate(arguments[0])
        experiment = load(path)
    except ConfigError as error:
        return _fail(error)

    import tyro

    from probes.after import look
    from training.checkpoint import CheckpointError
    from training.report import report
    from training.run import train

    kind = type(experiment)
    name = path.parent.name if path.name == "config.py" else path.stem

    @dataclasses.dataclass
    class Options:
        experiment: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        run: Path = Path("runs") / name
        """Folder of the run."""
        resume: str = "auto"
        """auto: go on where the folder has a run; never: refuse such a folder; or the folder of a run to go on from."""
        dry_run: bool = False
        """Stop after the summary."""

    try:
        options: Any = tyro.cli(
            Options, args=arguments[1:], prog=f"python train.py {arguments[0]}", default=Options(experiment)
        )
        outcome = train(options.experiment, options.run, resume=options.resume, dry_run=options.dry_run)
        if outcome["status"] == "done":
            report(options.experiment, outcome, options.run)
            look(outcome, options.run)
    except (ValueError, CheckpointError) as error:
        return _fail(error)
    if "message" in outcome:
        print(outcome["message"], file=sys.stderr)
    return {"stopped": 128 + outcome.get("signal", 0), "diverged": 1}.get(outcome["status"], 0)


def _fail(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

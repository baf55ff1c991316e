"""Trains a config: python train.py quickstart --train.steps 500. `python train.py --help` lists the configs."""

import sys
from pathlib import Path

from training.door import enter, failed


def _overview() -> str:
    from training.settings import config_files, describe

    lines = [f"  {name:24}{describe(path)}" for name, path in config_files().items()]
    return (
        "usage: python train.py CONFIG[@SIZE] [--run FOLDER] [--resume auto|never|FOLDER] [--dry-run] "
        "[--profile FIRST:LAST] [--field value ...]\n\n"
        "Trains a language model from a config: a name below, a .py file, or a run folder (its saved config).\n"
        "The same command goes on with a run that was stopped or killed.\n\n"
        "configs:\n" + "\n".join(lines) + "\n\n"
        "  python train.py CONFIG --help        every field of a config with its meaning and default\n"
        "  python train.py titans_lmm@340M      one of a config's other sizes, for those that have some\n"
        "  python train.py CONFIG --dry-run     its layers, parameters, state and compute, without training\n"
        "  python train.py CONFIG --profile 20:22  a trace of steps 20 to 22, for xprof or Perfetto\n"
        "  python train.py quickstart --model.D 128 --train.steps 200 --run runs/small"
    )


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0].startswith("-"):
        return failed(f"the first argument is a config, not {arguments[0]!r}: see python train.py --help")
    from training.settings import ConfigError, load, locate

    try:
        name, _, size = (arguments[0], "", "") if Path(arguments[0]).exists() else arguments[0].partition("@")
        path = locate(name)
        experiment = load(path, size)
    except ConfigError as error:
        return failed(error)

    from probes.after import look
    from training import processes
    from training.checkpoint import CheckpointError, reason
    from training.data import DataError
    from training.flags import Options, parse
    from training.report import report
    from training.run import train

    if Path(arguments[0]).is_dir():  # a run goes on where it is
        run = Path(arguments[0])
    else:
        stem = path.parent.name if path.name == "config.py" else path.stem
        run = Path("runs") / (f"{stem}@{size}" if size else stem)
    try:
        options = parse(Options(experiment, run), arguments[1:], program=f"python train.py {arguments[0]}")
        processes.start(options.processes)
        with processes.ended_together(ConfigError, DataError, CheckpointError, OSError):
            asked = {name: getattr(options, name) for name in ("resume", "dry_run", "profile", "hung")}
            outcome = train(options.experiment, options.run, **asked)
            if outcome["status"] == "done" and processes.first():
                report(options.experiment, outcome, options.run)
                look(outcome, options.run)
    except (ConfigError, DataError, CheckpointError) as error:
        return processes.failed(error, error, 2)
    except OSError as error:
        return processes.failed(error, reason(error), 2)
    if "message" in outcome and processes.first():
        print(outcome["message"], file=sys.stderr)
    return processes.finish({"stopped": 128 + outcome.get("signal", 0), "diverged": 1}.get(outcome["status"], 0))


if __name__ == "__main__":
    enter(main, "")  # while nothing was being trained: there is nothing to save

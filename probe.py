"""Asks models what they recall: python probe.py GatedDeltaNet --probes mqar. `python probe.py --help` lists all."""

import shlex
from pathlib import Path

from training.door import enter, failed

USAGE = """usage: python probe.py RUN                [--probes NAME ...] [--lengths T ...] [--rows N] ...
       python probe.py CONFIG|LAYER ...   [--probes NAME ...] [--seeds N] [--steps N] [--folder FOLDER] ...

RUN is the folder of a trained model: it is asked in text, at up to 16 times its training length.
A config's name, or a layer's (several, or `layers` for all that mix tokens): small models of it are trained on each
probe and asked it. What was done is kept in FOLDER/probe.jsonl: the same command goes on, and adds to the report.

  python probe.py RUN --help                      options for a trained model
  python probe.py GatedDeltaNet --help            options, and every field of a layer
  python probe.py GatedDeltaNet Attention --probes mqar overwrite --seeds 3
  python probe.py DeltaNet --layer.negative_eigenvalues --probes parity
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from probes.asking import overview

        print(USAGE + "\n" + overview())
        return 0
    names = arguments[: next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))]
    flags = arguments[len(names) :]
    if not names:
        return failed(
            f"the first argument is a run, a config or a layer, not {arguments[0]!r}: see python probe.py --help"
        )

    from probes.asking import ask_run, ask_small
    from training.checkpoint import CheckpointError, reason
    from training.data import DataError
    from training.settings import ConfigError

    command = "python probe.py " + shlex.join(arguments)
    try:
        if (Path(names[0]) / "config.py").is_file():
            if len(names) > 1:
                return failed(f"one run at a time: leave out {' '.join(names[1:])}")
            report = ask_run(Path(names[0]), flags, command)
        else:
            report = ask_small(names, flags, command)
    except (ConfigError, DataError, CheckpointError) as error:
        return failed(error)
    except OSError as error:
        return failed(reason(error))
    print(f"written: {report}")
    return 0


if __name__ == "__main__":
    enter(main, "; what was done is kept, and the same command goes on")

"""Ablates memory layers: python ablate.py STUDY, or RUN. `python ablate.py --help` lists the studies."""

import shlex
import sys
from pathlib import Path

from training.door import enter, failed

USAGE = """usage: python ablate.py STUDY[@TIER]  [--only CELL ...] [--seeds N] [--folder FOLDER] [--dry-run] ...
       python ablate.py RUN           [--parts layers tables writes window] [--batches N] [--step N] [--folder FOLDER]

STUDY is a name below or a .py file: its grid is trained, and results/STUDY/ gets a table, pictures and a report. What
is done is kept: the same command goes on after a stop, and trains nothing when all is done.
RUN is the folder of a trained model: it is asked its held-out data again, untrained, without each of its parts, and
RUN/ablation/ gets a report of what each is worth. What was asked is kept, too.

  python ablate.py STUDY --help               options
  python ablate.py STUDY --dry-run            its cells, what they are matched in, what is left to train
  python ablate.py recall_frontier --workers 2   two cells at a time, on CPU cores of their own
  python ablate.py recall_frontier@smoke      another tier of a study: smoke (a minute), laptop, paper (a GPU)
  python ablate.py runs/quickstart --help     options for a trained model
  python ablate.py runs/quickstart --parts layers window --batches 4
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from probes.studies import study_files
        from training.settings import describe

        print(USAGE + "\nstudies:\n" + "\n".join(f"  {n:24}{describe(path)}" for n, path in study_files().items()))
        return 0
    if arguments[0].startswith("-"):
        return failed(f"the first argument is a study or a run, not {arguments[0]!r}: see python ablate.py --help")

    from probes.ablation import Stopped
    from training.checkpoint import CheckpointError, reason
    from training.data import DataError
    from training.settings import ConfigError

    try:
        if (Path(arguments[0]) / "config.py").is_file():
            from probes.without import ablate_run

            command = "python ablate.py " + shlex.join(arguments)
            written: Path | None = ablate_run(Path(arguments[0]), arguments[1:], command)
        else:
            from probes.ablating import ablate

            written = ablate(arguments[0], arguments[1:], "python ablate.py " + shlex.join(arguments[:1]))
    except Stopped as signal:
        print(f"{signal}: what was done is kept, and the same command goes on", file=sys.stderr)
        return 130
    except (ConfigError, DataError, CheckpointError) as error:
        return failed(error)
    except OSError as error:
        return failed(reason(error))
    if written is not None:
        print(f"written: {written}")
    return 0


if __name__ == "__main__":
    enter(main, "; what was done is kept, and the same command goes on")

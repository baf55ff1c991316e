"""Launches a training elsewhere: python -m tpu.launch TARGET CONFIG [options] [-- flags of train.py]."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import tyro

from tpu.cloud import queued, vm
from tpu.gke import gke
from tpu.options import TARGETS, check_config, check_flags, check_training, default_folder
from tpu.plan import LaunchError, Plan
from tpu.slurm import slurm
from training.door import enter, failed
from training.flags import parse
from training.settings import ConfigError

PLANS: dict[str, Callable[..., Plan]] = {"vm": vm, "queued": queued, "gke": gke, "slurm": slurm}

USAGE = """usage: python -m tpu.launch TARGET CONFIG [--option value ...] [-- flags of train.py ...]

Prints, as a bash script, all that a launch would do: every file and every command. --run does it. What follows --
goes to train.py as it is.

targets:
  vm        a Cloud TPU VM, or a slice of several, over ssh
  queued    a TPU that is waited for, trains by itself when it comes, and is asked for again when it was taken away
  gke       a JobSet on Google's Kubernetes
  slurm     a job on a GPU cluster, from its login node

--action says what to do with it:
  start     create it, get the code and its environment, train (unless said otherwise)
  resume    train on what is there: the run goes on (vm, slurm; queued and gke go on by themselves)
  watch     start, and again whenever the TPU was taken away, until the training has ended (queued)
  restart   delete it and start again: the run goes on where its folder has a checkpoint
  logs      follow what is printed
  delete    end it

  python -m tpu.launch vm --help          every option of a target, with its meaning
  python -m tpu.launch vm quickstart --name small --project my-project --zone us-west4-a --accelerator v5litepod-8 \\
      --repository https://example.org/engrax.git --commit $(git rev-parse HEAD) -- --train.steps 500

tpu/README.md has a page on it all."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        return launch(arguments)
    except ConfigError as error:
        return failed(error)
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}")


def launch(arguments: list[str]) -> int:
    """Prints or performs what the command line says. Raises ConfigError, in one line, for what it cannot mean."""
    target, *rest = arguments
    if target not in TARGETS:
        raise ConfigError(f"there is no target {target!r}: it must be one of {', '.join(TARGETS)}")
    cut = rest.index("--") if "--" in rest else len(rest)
    said, flags = rest[:cut], rest[cut + 1 :]
    default, program = TARGETS[target](), f"python -m tpu.launch {target} CONFIG"
    if "-h" in said or "--help" in said:
        missing = dict.fromkeys(default.required(), tyro.MISSING)  # which are shown as required
        parse(dataclasses.replace(default, **missing), ["--help"], program=program)
    if not said or said[0].startswith("-"):
        raise ConfigError(f"a config comes after the target: python -m tpu.launch {target} quickstart ...")
    config = said.pop(0)
    for flag in said:
        if flag.startswith("--") and "." in flag.split("=")[0]:
            raise ConfigError(f"{flag} is for train.py, whose flags follow --: ... -- {flag}")
    check_config(config)
    check_flags(flags)
    options = parse(default, said, program=program)
    if not options.folder and target != "slurm":
        options = dataclasses.replace(options, folder=default_folder(config))
    options.check()
    if options.action not in ("logs", "delete"):
        check_training(options, config, flags)
    plan = PLANS[target](options, config, flags, Path("runs/launch") / options.name)
    if not options.run:
        first = "This is what --run would do; nothing was done."
        if options.action != "delete":
            check = shlex.join(["python", "train.py", config, *flags, "--dry-run"])
            first += f" Try the config here first: {check}"
        print(dataclasses.replace(plan, notes=(first, *plan.notes)).script(), end="")
        return 0
    if plan.notes:
        print("\n".join(plan.notes), flush=True)
    try:
        plan.perform()
    except LaunchError as error:
        return failed(error, 1)
    return 0


if __name__ == "__main__":
    enter(main, "; what was created stays until --action delete")

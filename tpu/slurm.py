"""A job on a GPU cluster under Slurm: one process a node, which saves and queues again before its time is up."""

from pathlib import Path

from tpu import scripts
from tpu.options import Slurm
from tpu.plan import Command, Plan

# USR1 goes to train.py three minutes before the limit: it saves and leaves with 138, and the job queues again. A job
# that is preempted or loses a node, Slurm queues again by itself; one that loses a process tries again within its time.
# Singleton: the job waits for an older one of the same name. The processes find each other by the variables that srun
# sets for each (training/processes.py).
_DIRECTIVES = """\
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
#SBATCH --dependency=singleton
"""

_AGAIN = r"""
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def job(options: Slurm, config: str, flags: list[str], log: str) -> str:
    """The script for sbatch. log: where what is printed goes, on the shared disk."""
    directives = _DIRECTIVES.format(log=log, **vars(options))
    directives += f"#SBATCH --partition={options.partition}\n" if options.partition else ""
    directives += f"#SBATCH --account={options.account}\n" if options.account else ""
    # JAX takes one GPU a process under Slurm unless it is told which; here a process has all of its node's.
    ids = ",".join(map(str, range(options.gpus)))
    train = scripts.train(options, config, flags, how="srun --kill-on-bad-exit=1 ", again=True, after=_AGAIN.lstrip())
    return scripts.script(f"{directives}\nexport JAX_LOCAL_DEVICE_IDS={ids}\n", train)


def slurm(options: Slurm, config: str, flags: list[str], place: Path) -> Plan:
    """Sets the code up on the shared disk, from the login node, and submits the job.

    place: the folder for the files, on this machine.
    """
    log = f"{options.folder}/slurm.log"
    files = {
        place / "setup.sh": scripts.script(scripts.setup(options, "cuda")),
        place / "train.sbatch": job(options, config, flags, log),
    }
    make = Command("Make the run's folder, where the log goes.", ("mkdir", "-p", options.folder))
    setup = Command("Get the code and its environment, on the disk that all nodes see.", ("bash", f"{place}/setup.sh"))
    submit = Command("Submit the job; a run that was begun goes on.", ("sbatch", f"{place}/train.sbatch"))
    cancel = ("scancel", "--me", f"--name={options.name}")
    commands = {
        "start": (make, setup, submit),
        "resume": (submit,),
        "restart": (Command("Cancel the job; the new one waits for its end.", cancel, may_fail=True), setup, submit),
        "logs": (
            Command("Say where the job stands.", ("squeue", "--me", f"--name={options.name}")),
            Command("Follow the log.", ("tail", "-n", "200", "-F", log)),
        ),
        "delete": (Command("Cancel the job; the run stays in its folder.", cancel),),
    }[options.action]
    needed = options.action in ("start", "resume", "restart")
    return Plan((), files if needed else {}, commands)

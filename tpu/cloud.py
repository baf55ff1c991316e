"""Cloud TPU VMs: asked for at once (`vm`), or in a queue that brings them when there are some (`queued`)."""

from pathlib import Path

from tpu import scripts
from tpu.options import Queued, Vm
from tpu.plan import Command, Plan

# Asks again each time that the TPU was taken away. No answer, where the network failed, changes nothing. Warnings may
# stand before the state. A training that was told to stop goes on with its TPU, which is mostly about to go: where it
# is neither gone nor back after ten looks, somebody else told it, and the TPU is asked for anew.
_WATCH = r"""
again() {
  "${forget[@]}" 2> /dev/null || true
  "${delete[@]}" 2> /dev/null || true
  "${create[@]}" || { echo "error: the request was refused" >&2; exit 1; }
}
stopped=0
while true; do
  if ! state=$("${describe[@]}" 2>&1); then
    echo "$state"
    case "$state" in *NOT_FOUND*) state=ABSENT ;; *) state="no answer" ;; esac
  fi
  echo "$(date) $state"
  case "$state" in
    *SUSPENDED | ABSENT)
      again
      stopped=0
      ;;
    *FAILED)
      echo "error: the request failed; describe it to see why: ${describe[*]}" >&2
      exit 1
      ;;
    *ACTIVE)
      status=$("${ended[@]}" 2> /dev/null) || status=
      case $status in
        "") stopped=0 ;;
        STOPPED)
          stopped=$((stopped + 1))
          if [ "$stopped" -ge 10 ]; then
            echo "the training was told to stop, exit status $status, and its TPU stays: asking for it anew"
            again
            stopped=0
          fi
          ;;
        *)
          echo "the training ended with exit status $status; deleting the TPU, the run stays in its bucket"
          "${delete[@]}"
          exit "$status"
          ;;
      esac
      ;;
  esac
  sleep 60
done
""".replace("STOPPED", scripts.STOPPED)

# Says how the training ended, in the bucket, whatever the end. A TPU that comes back trains again, and what it said
# when it was told to stop holds no more.
_ENDING = r"""
case $(gcloud storage cat "$ended" 2> /dev/null) in STOPPED) gcloud storage rm --quiet "$ended" || true ;; esac
ending() {
  local status=$?
  echo "$status" | gcloud storage cp --quiet - "$ended"
}
trap ending EXIT
trap 'exit 143' TERM
""".replace("STOPPED", scripts.STOPPED)


def _at(options: Vm) -> tuple[str, ...]:
    return f"--project={options.project}", f"--zone={options.zone}"


def _gcloud(options: Vm, kind: str, verb: str, *more: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", kind, verb, options.name, *_at(options), *more)


def _ssh(options: Vm, command: str, worker: str = "all") -> tuple[str, ...]:
    return _gcloud(options, "tpu-vm", "ssh", f"--worker={worker}", f"--command={command}")


def vm(options: Vm, config: str, flags: list[str], place: Path) -> Plan:
    """Creates a TPU VM, sets every worker up and trains on it, all over ssh.

    place: the folder for the files, on this machine.
    """
    runtime = options.runtime or options.slice.generation.runtime
    kind = (f"--accelerator-type={options.accelerator}", f"--version={runtime}")
    create = _gcloud(options, "tpu-vm", "create", *kind, *(("--spot",) if options.spot else ()))
    delete = _gcloud(options, "tpu-vm", "delete", "--quiet")
    files = {
        place / "setup.sh": scripts.script(scripts.setup(options, "tpu", packages=True)),
        place / "train.sh": scripts.script(scripts.train(options, config, flags, bucket=options.bucket, how="exec ")),
    }
    # The call returns at once: the training outlives it, and writes where `logs` looks.
    begin = f"setsid nohup bash train.sh >> {options.name}.log 2>&1 < /dev/null &"
    copied = ("gcloud", "compute", "tpus", "tpu-vm", "scp", *map(str, files), f"{options.name}:")
    train = (
        Command("Copy the scripts to every worker.", (*copied, *_at(options), "--worker=all")),
        Command("Get the code and its environment, on every worker.", _ssh(options, "bash setup.sh")),
        Command("Train, or go on; it stays when the connection ends.", _ssh(options, begin)),
    )
    created = Command("Create the TPU.", create)
    gone = "Delete the TPU that was taken away."
    commands = {
        "start": (created, *train),
        "resume": train,
        "restart": (Command(gone, delete, may_fail=True), created, *train),
        "logs": (Command("Follow the log.", _ssh(options, f"tail -n 200 -F {options.name}.log", worker="0")),),
        "delete": (Command("Delete the TPU, with all that is on its disk.", delete),),
    }[options.action]
    notes: tuple[str, ...] = ()
    if not options.bucket:
        notes = ("The run is on the TPU's own disk: copy it before --action delete, or give --bucket.",)
    needed = options.action in ("start", "resume", "restart")
    return Plan(notes, files if needed else {}, commands)


def queued(options: Queued, config: str, flags: list[str], place: Path) -> Plan:
    """Asks for a TPU that sets itself up and trains when it comes, and asks again when it was taken away.

    place: the folder for the files, on this machine.
    """
    runtime = options.runtime or options.slice.generation.runtime
    ended = f"gs://{options.bucket}/{options.folder}/launch.status"
    startup = place / "startup.sh"
    create = _gcloud(
        options,
        "queued-resources",
        "create",
        f"--node-id={options.name}",
        f"--accelerator-type={options.accelerator}",
        f"--runtime-version={runtime}",
        f"--metadata-from-file=startup-script={startup}",
        *(("--spot",) if options.spot else ()),
    )
    delete = _gcloud(options, "queued-resources", "delete", "--force", "--quiet")
    describe = _gcloud(options, "queued-resources", "describe", "--format=value(state.state)")
    forget = ("gcloud", "storage", "rm", "--quiet", ended)
    files = {
        startup: scripts.script(
            scripts.assignments(ended=ended) + _ENDING,
            scripts.setup(options, "tpu", packages=True),
            scripts.train(options, config, flags, bucket=options.bucket, again=True, after='exit "$status"\n'),
        )
    }
    if options.action == "watch":
        arrays = scripts.arrays(
            create=create, delete=delete, describe=describe, forget=forget, ended=("gcloud", "storage", "cat", ended)
        )
        files[place / "watch.sh"] = scripts.script(
            f"# Keeps a TPU asked for until the training has ended.\n{arrays}{_WATCH}"
        )
    ask = (
        Command("Forget how an earlier training ended.", forget, may_fail=True),
        Command("Ask for the TPU; it trains by itself when it comes.", create),
    )
    follow = "sudo journalctl --unit google-startup-scripts --lines 200 --output cat --follow"
    commands = {
        "start": ask,
        "watch": (Command("Ask, and ask again whenever the TPU was taken away.", ("bash", str(place / "watch.sh"))),),
        "restart": (Command("Delete the request and its TPU.", delete, may_fail=True), *ask),
        "logs": (
            Command("Say where the request stands.", describe),
            Command("Follow the log.", _ssh(options, follow, worker="0")),
        ),
        "delete": (Command("Delete the request and its TPU; the run stays in its bucket.", delete),),
    }[options.action]
    needed = options.action in ("start", "watch", "restart")
    return Plan((), files if needed else {}, commands)

"""The bash that runs on the workers: one part gets the code and its environment, one trains.

Each begins with assignments, quoted, and goes on with text that is always the same.
"""

import shlex

from tpu.options import Common

_SETUP = r"""
set -eE
trap 'echo "error: setup stopped at: $BASH_COMMAND" >&2; exit 75' ERR
export HOME="${HOME:-/root}"
"""

# The image of a TPU VM may have an older Python. At its first start, other installers hold the lock for a while.
_PACKAGES = r"""
for program in git make "$python"; do
  command -v "$program" > /dev/null && continue
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y git make "$python" "$python-venv" > /dev/null
done
"""

_CODE = r"""
code="$HOME/engrax-$commit"
mkdir -p "$code"
cd "$code"
git init --quiet
git cat-file -e "$commit" 2> /dev/null || git fetch --quiet --depth 1 "$repository" "$commit"
git checkout --quiet --detach "$commit"
make env ACCELERATOR="$accelerator" PYTHON="$python"
trap - ERR
"""

# A checkpoint is whole when its folder is renamed, which a plain bucket does file by file, and only if it is told.
_MOUNT = r"""
command -v gcsfuse > /dev/null || { echo "error: gcsfuse is not on this image: see tpu/README.md" >&2; exit 75; }
mkdir -p "$HOME/bucket"
mountpoint -q "$HOME/bucket" || gcsfuse --implicit-dirs --rename-dir-limit 100000 "$bucket" "$HOME/bucket"
"""

# Exit statuses after which the same command goes on, but not at once: 128 + the signal that said so.
STOPPED = "130 | 138 | 143"
# Those that would only come again: it diverged, or an error was not foreseen (1); it cannot be trained (2).
FINAL = (1, 2)

# From any other end the same command goes on: a process was lost (69), a step hung (70), a runtime or the kernel ended
# it (134, 137, 139). Ten tries, counted anew when a checkpoint came in between.
_AGAIN = """\
newest() {{ ls {run}/checkpoints 2> /dev/null | grep -x '[0-9]*' | sort -n | sed -n '$p'; }}
tries=0 reached=$(newest)
while true; do
  status=0
  {command} || status=$?
  case $status in 0 | {final} | {stopped}) break ;; esac
  now=$(newest)
  if [ "${{now:-0}}" -gt "${{reached:-0}}" ]; then tries=0 reached=$now; fi
  tries=$((tries + 1))
  [ "$tries" -lt 10 ] || break
  sleep 10
done
"""


def assignments(**values: str) -> str:
    """Lines of bash that set variables, whatever the values hold."""
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items()) + "\n"


def setup(options: Common, accelerator: str, *, packages: bool = False) -> str:
    """Gets the code at the commit, and its environment. Called again it changes nothing; exit status 75 if it fails.

    accelerator: as `make env` has it. packages: install what is missing, as on a TPU VM one may.
    """
    head = assignments(
        repository=options.repository, commit=options.commit, python=options.python, accelerator=accelerator
    )
    return f"# The code at one commit, and its environment.\n{head}{_SETUP}{_PACKAGES * packages}{_CODE}"


def train(
    options: Common,
    config: str,
    flags: list[str],
    *,
    root: str = "",
    bucket: str = "",
    how: str = "",
    again: bool = False,
    after: str = "",
) -> str:
    """Trains, or goes on: train.py goes on where the run's folder has a checkpoint.

    root: a folder that the run's is in; empty for the code's. bucket: mounted first, with the run's folder in it.
    how: what stands before the command: exec, so that it gets the signals, or what starts it on every node.
    again: until it has come to an end of which `$status` says the exit status. after: what stands behind it.
    """
    head = assignments(commit=options.commit, config=config, **({"bucket": bucket} if bucket else {}))
    folder = ('"$HOME/bucket"/' if bucket else root) + shlex.quote(options.folder)
    command = f'{how}.venv/bin/python train.py "$config" --run {folder} "${{flags[@]}}"'
    if again:
        command = _AGAIN.format(run=folder, command=command, final=" | ".join(map(str, FINAL)), stopped=STOPPED)
    return (
        "# The same command trains, and goes on where the run's folder has a checkpoint.\n"
        f"{head}flags=({shlex.join(flags)})\n\n"
        f'set -e\nexport HOME="${{HOME:-/root}}"\n{_MOUNT.lstrip() if bucket else ""}'
        f'cd "$HOME/engrax-$commit"\n'
        f"{command.rstrip()}\n{after}"
    )


def script(*parts: str) -> str:
    """Parts one after the other, as a file."""
    return "#!/bin/bash\n" + "\n".join(parts)


def arrays(**commands: tuple[str, ...]) -> str:
    """Lines of bash that set arrays of words, one for each command."""
    return "\n".join(f"{name}=({shlex.join(words)})" for name, words in commands.items()) + "\n"

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
    options: Common, config: str, flags: list[str], *, root: str = "", bucket: str = "", how: str = "", after: str = ""
) -> str:
    """Trains, or goes on: train.py goes on where the run's folder has a checkpoint.

    root: a folder that the run's is in; empty for the code's. bucket: mounted first, with the run's folder in it.
    how: what stands before the command: exec, so that it gets the signals, or what starts it on every node.
    after: what stands behind it.
    """
    head = assignments(commit=options.commit, config=config, **({"bucket": bucket} if bucket else {}))
    folder = ('"$HOME/bucket"/' if bucket else root) + shlex.quote(options.folder)
    return (
        "# The same command trains, and goes on where the run's folder has a checkpoint.\n"
        f"{head}flags=({shlex.join(flags)})\n\n"
        f'set -e\nexport HOME="${{HOME:-/root}}"\n{_MOUNT.lstrip() if bucket else ""}'
        f'cd "$HOME/engrax-$commit"\n'
        f'{how}.venv/bin/python train.py "$config" --run {folder} "${{flags[@]}}"{after}\n'
    )


def script(*parts: str) -> str:
    """Parts one after the other, as a file."""
    return "#!/bin/bash\n" + "\n".join(parts)


def arrays(**commands: tuple[str, ...]) -> str:
    """Lines of bash that set arrays of words, one for each command."""
    return "\n".join(f"{name}=({shlex.join(words)})" for name, words in commands.items()) + "\n"

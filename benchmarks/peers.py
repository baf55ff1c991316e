"""Where the peers live: environments of their own, which the project never imports from.

`.venv-peers` holds PyTorch, fla-core and titans-pytorch, on the Python of the project. tokamax needs Python 3.12 and a
newer jax, so it gets `.venv-peers-tokamax`, on the first newer Python found (or $TOKAMAX_PYTHON). MaxText is a checkout
that the user names: one function of it is read, nothing is installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")


class Peer(NamedTuple):
    module: str
    arguments: tuple[str, ...]
    python: str
    missing: str  # why it cannot be run; "" when it can


def find(name: str, python: str | None = None, checkout: str | None = None) -> Peer:
    """The peer called `torch`, `tokamax` or `maxtext`. `python`: an interpreter that has it, instead of ours."""
    jax_module = "benchmarks.contestants_jax"
    if name == "maxtext":
        missing = "" if checkout and Path(checkout).is_dir() else "needs --maxtext CHECKOUT"
        return Peer(jax_module, ("maxtext", str(checkout)), sys.executable, missing)
    folder = {"torch": ".venv-peers", "tokamax": ".venv-peers-tokamax"}[name]
    interpreter = Path(python) if python else ROOT / folder / "bin" / "python"
    missing = "" if interpreter.exists() else "peer not installed: make bench-peers"
    if name == "torch":
        return Peer("benchmarks.contestants_torch", (), str(interpreter), missing)
    return Peer(jax_module, ("tokamax",), str(interpreter), missing)


def install() -> None:
    """Creates the environments. Raises CalledProcessError where pip fails; says so where no Python is new enough."""
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    tokamax = [line for line in wanted if line.startswith("tokamax")]
    _environment(sys.executable, ".venv-peers", [line for line in wanted if line not in tokamax])
    newer = _newer_python()
    if newer is None:
        print("tokamax needs Python 3.12 or newer: none found, set TOKAMAX_PYTHON to one")
    else:
        _environment(newer, ".venv-peers-tokamax", tokamax)


def _environment(python: str, folder: str, requirements: list[str]) -> None:
    target = ROOT / folder
    print(f"{folder}: {', '.join(requirements)}", flush=True)
    if not (target / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(target)], check=True)
    subprocess.run([str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", *requirements], check=True)


def _newer_python() -> str | None:
    named = os.environ.get("TOKAMAX_PYTHON")
    candidates = [named] if named else [sys.executable, "python3.13", "python3.12"]
    for candidate in candidates:
        found = shutil.which(candidate)
        test = "import sys; sys.exit(sys.version_info < (3, 12))"
        if found and subprocess.run([found, "-c", test], capture_output=True).returncode == 0:
            return found
    return None

"""train.py in several processes over loopback, each with fake devices of its own.

Called as a program it is train.py, without pictures: in their place it prints the hash of the trained parameters.
"""

import contextlib
import dataclasses
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cheap
import numpy as np
import tiny

from layers.attention import Attention
from layers.linear import LinearAttention
from layers.mlp import MLP
from models.lm import LM, Stage
from training import settings
from training.experiment import Experiment, Mesh

CACHE = tiny.ROOT / ".cache" / "jax"


def experiment(folder: Path, **changes: Any) -> Experiment:
    """One recurrent and one attention layer; a batch for eight devices."""
    model = LM(W=257, D=16, stages=(Stage((LinearAttention(H=2, K=4, V=8), Attention(H=2, K=8), MLP())),))
    made = tiny.experiment(folder, model=model, data__B=8, mesh=Mesh(), train__steps=5, train__checkpoint_every=3)
    return tiny.changed(made, **changes)


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "crowd_config.py"
    path.write_text(settings.render(experiment(folder, **changes)))
    return path


def digest(arrays: dict[str, Any]) -> str:
    """Of arrays by name, to the bit."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode() + np.asarray(arrays[name]).tobytes())
    return total.hexdigest()


def port(least: int = 0) -> int:
    """One that is free: from `least` on."""
    for number in range(least, 65536):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", number))
            return one.getsockname()[1]
    raise OSError(f"no port is free from {least} on")


def environment(devices: int, **more: str) -> dict[str, str]:
    xla = [f for f in cheap.flags() if "device_count" not in f] + [f"--xla_force_host_platform_device_count={devices}"]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(xla),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")]),
        **more,
    }


@dataclasses.dataclass
class Ended:
    """How one process ended."""

    status: int
    out: str
    err: str


class Crowd:
    """Processes that train together: Crowd(2, 4, config, "--run", run) is two with four devices each.

    variables: of the environment, by index, instead of flags that join them. largest_file: that some may write, by
    index. more: arguments of some, by index. program: Python to run in place of this file; it calls `main`.
    """

    def __init__(
        self,
        count: int,
        devices: int,
        *arguments: Any,
        variables: Callable[[int], dict[str, str]] | None = None,
        largest_file: dict[int, int] | None = None,
        more: dict[int, list[str]] | None = None,
        program: str | None = None,
    ):
        place, self.processes = f"127.0.0.1:{port()}", []
        for index in range(count):
            start = [__file__] if program is None else ["-c", program]
            words = [sys.executable, *start, *map(str, arguments), *(more or {}).get(index, [])]
            if variables is None and count > 1:
                words += ["--processes.coordinator", place, f"--processes.count={count}", f"--processes.index={index}"]
            if index in (largest_file or {}):
                words = [sys.executable, "-c", tiny.LIMITED, str(largest_file[index]), *words[1:]]
            env = environment(devices, **(variables(index) if variables else {}))
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes.append(subprocess.Popen(words, cwd=tiny.ROOT, env=env, text=True, **pipes))

    def ended(self, timeout: float = 120) -> list[Ended]:
        """Waits for all. None is left behind, whatever happens."""
        try:
            return [Ended(p.returncode, *said) for p in self.processes for said in [p.communicate(timeout=timeout)]]
        finally:
            for process in self.processes:
                process.kill()


def main() -> int:
    import probes.after
    import train
    import training.report
    from models.parameters import flatten

    def hashed(experiment: Experiment, outcome: Any, run: Path) -> None:
        print("parameters", digest(flatten(outcome["model"])[0]))

    training.report.report, probes.after.look = hashed, lambda *_: None
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

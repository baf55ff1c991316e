"""What `python -m tpu.launch` was asked for, and what is refused before anything happens."""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

from tpu import chips
from training.settings import ROOT, ConfigError, config_files, load, locate

# Names that stand in commands, manifests and scripts: none needs quoting anywhere.
FORMS = {
    "name": (r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "lower-case letters, digits and dashes, at most 40, such as small-1"),
    "project": (r"[a-z][-a-z0-9]{4,28}[a-z0-9]", "the id of a Google Cloud project, such as my-project"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z0-9]+", "a zone, such as us-west4-a"),
    "bucket": (r"[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]", "a bucket's name without gs://, such as my-runs"),
    "runtime": (r"[a-z0-9][-a-z0-9.]*", "the image of a TPU VM, such as v2-alpha-tpuv5-lite"),
    "repository": (r"(https://|ssh://|git@|file:///|/)[-A-Za-z0-9_.:/@~+]+", "what git clones, such as https://..."),
    "commit": (r"[0-9a-f]{40}", "all 40 digits, from git rev-parse HEAD, so that a restart runs the same code"),
    "folder": (r"[A-Za-z0-9_.@+=/-]+", "a path of letters, digits and _ . @ + = - /"),
    "python": (r"[A-Za-z0-9_.@+=/-]+", "a Python 3.11 or newer, such as python3.11"),
    "image": (r"[a-z0-9][-A-Za-z0-9_.:/@]*", "a container image with Python, git and make, such as python:3.12"),
    "accelerator": (r".+", "a TPU type, such as v5litepod-8"),
    "account": (r"[A-Za-z0-9_][-A-Za-z0-9_.]*", "an account of the cluster"),
    "partition": (r"[A-Za-z0-9_][-A-Za-z0-9_.,]*", "a partition of the cluster"),
    "service_account": (r"[a-z0-9][-a-z0-9.]*", "a Kubernetes service account that may write to the bucket"),
    "time": (r"([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}", "hours:minutes:seconds or days-hours:minutes:seconds"),
}


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every target.

    name: what the job, the TPU or the request is called.
    repository: where every worker gets the code. commit: of that code, all 40 digits.
    folder: the run's folder, as --run of train.py; empty for runs/ and the config's name.
    python: the Python on the worker that makes the environment.
    action: what to do; start unless said.
    run: do it, rather than print it. dry_run: print it, which is done anyway.
    """

    name: str = ""
    repository: str = ""
    commit: str = ""
    folder: str = ""
    python: str = "python3.11"
    action: str = "start"
    run: bool = False
    dry_run: bool = False
    actions: ClassVar[tuple[str, ...]] = ("start", "logs", "restart", "delete")
    optional: ClassVar[tuple[str, ...]] = ("folder",)  # fields that may be empty

    @property
    def hosts(self) -> int:
        """Machines that train, with a process each (training/processes.py)."""
        raise NotImplementedError

    @property
    def devices(self) -> int:
        """That JAX will see, of all machines."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """What these devices are, as the command line has it."""
        raise NotImplementedError

    @classmethod
    def required(cls) -> list[str]:
        """Fields that have to be given."""
        empty = [field.name for field in dataclasses.fields(cls) if field.name in FORMS and field.default == ""]
        return [name for name in empty if name not in cls.optional]

    def check(self) -> None:
        """Raises ConfigError, in a line that names the field, for what cannot be launched."""
        if self.action not in self.actions:
            raise ConfigError(f"action is {self.action!r}: it must be one of {', '.join(self.actions)}")
        if self.run and self.dry_run:
            raise ConfigError("--run does it and --dry-run prints it: give one of them")
        if missing := [name for name in self.required() if getattr(self, name) == ""]:
            said = "; ".join(f"{_flag(name)}, {FORMS[name][1]}" for name in missing)
            raise ConfigError(f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} empty: give {said}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            form, meaning = FORMS.get(field.name, (None, ""))
            if form is None or (value == "" and field.name in self.optional):
                continue
            if not re.fullmatch(form, value):
                given = "is empty" if value == "" else f"is {value!r}"
                raise ConfigError(f"{field.name} {given}: give {_flag(field.name)}, {meaning}")
        if ".." in self.folder.split("/"):
            raise ConfigError(f"folder is {self.folder!r}: give it without ..")


@dataclasses.dataclass(frozen=True)
class Tpu(Common):
    """Options of every TPU.

    accelerator: the TPU's type, such as v5litepod-8. bucket: of Cloud Storage, mounted, with the run's folder in it.
    spot: a TPU that is cheaper and can be taken away at any time.
    """

    accelerator: str = ""
    bucket: str = ""
    spot: bool = False

    @property
    def slice(self) -> chips.Slice:
        return chips.read(self.accelerator)

    @property
    def hosts(self) -> int:
        return self.slice.hosts

    @property
    def devices(self) -> int:
        return self.slice.devices

    @property
    def place(self) -> str:
        return f"accelerator {self.accelerator}"

    def check(self) -> None:
        super().check()
        if self.folder.startswith("/"):
            raise ConfigError(
                f"folder is {self.folder!r}: on a TPU it lies in the bucket (or, without one, beside the code): "
                "give it without the leading /"
            )
        if self.bucket == "" and (self.spot or self.hosts > 1):
            reason = "a spot TPU's disk goes with it" if self.spot else "several hosts share no disk"
            raise ConfigError(f"folder {self.folder!r} would be on the TPU's own disk, but {reason}: give --bucket")


@dataclasses.dataclass(frozen=True)
class Vm(Tpu):
    """A Cloud TPU VM, or a slice of several.

    project, zone: of Google Cloud. runtime: the VM's image; empty for the one that suits the accelerator.
    """

    project: str = ""
    zone: str = ""
    runtime: str = ""
    actions: ClassVar[tuple[str, ...]] = ("start", "resume", "logs", "restart", "delete")
    optional: ClassVar[tuple[str, ...]] = ("folder", "bucket", "runtime")

    def check(self) -> None:
        super().check()
        if self.bucket == "" and self.action == "restart":
            raise ConfigError("restart deletes the TPU, and the run on its disk: give --bucket, or use --action resume")


@dataclasses.dataclass(frozen=True)
class Queued(Vm):
    """A queued resource: a TPU that is asked for, comes when there is one, and trains as soon as it is up."""

    actions: ClassVar[tuple[str, ...]] = ("start", "watch", "logs", "restart", "delete")
    optional: ClassVar[tuple[str, ...]] = ("folder", "runtime")


@dataclasses.dataclass(frozen=True)
class Gke(Tpu):
    """A JobSet on a Kubernetes cluster of Google's, by the current context of kubectl.

    image: of the container, with Python, git and make. python: the image's.
    restarts: how often the job begins again after a host was lost.
    service_account: of Kubernetes; it may write to the bucket.
    """

    image: str = "python:3.12"
    python: str = "python3.12"
    restarts: int = 100
    service_account: str = "default"

    def check(self) -> None:
        super().check()
        if not self.slice.generation.node:
            raise ConfigError(f"accelerator is {self.accelerator!r}: on gke take v6e, v5p, v5litepod or v4")
        if self.restarts < 0:
            raise ConfigError(f"restarts is {self.restarts}: it must be at least 0")


@dataclasses.dataclass(frozen=True)
class Slurm(Common):
    """A job on a GPU cluster; the launcher is called on its login node.

    folder: the run's, on a disk that every node sees, from / on.
    nodes: machines. gpus, cpus: of each machine.
    time: limit of one job, hours:minutes:seconds; a job that reaches it saves, and queues again.
    partition, account: of the cluster; empty for its defaults.
    """

    nodes: int = 1
    gpus: int = 8
    cpus: int = 16
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    actions: ClassVar[tuple[str, ...]] = ("start", "resume", "logs", "restart", "delete")
    optional: ClassVar[tuple[str, ...]] = ("partition", "account")

    @property
    def hosts(self) -> int:
        return self.nodes

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus

    @property
    def place(self) -> str:
        return f"--nodes {self.nodes} --gpus {self.gpus}"

    def check(self) -> None:
        for field in ("nodes", "gpus", "cpus"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}: it must be at least 1")
        super().check()
        local = re.match(r"(?!/)|/(var/)?tmp(/|$)|/dev/", self.folder)
        if local:
            raise ConfigError(
                f"folder is {self.folder!r}: it must lie on a disk that every node sees, since a job may go on on "
                "another: give --folder, from / on"
            )


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


TARGETS: dict[str, type[Common]] = {"vm": Vm, "queued": Queued, "gke": Gke, "slurm": Slurm}


def check_config(name: str) -> None:
    """Raises ConfigError for a config that a worker would not find: neither of configs/ nor a file of the code."""
    plain = name.partition("@")[0]
    if not re.fullmatch(r"[A-Za-z0-9_./@+-]+", name):
        raise ConfigError(f"the config is {name!r}: a name in configs/, or a .py file of this repository")
    if plain in config_files():
        return
    path = locate(plain)
    if path.is_absolute() or path.suffix != ".py" or path.name == "config.py" or not (ROOT / path).is_file():
        raise ConfigError(f"{name} is not a file of the code that the workers get: commit it, and call from its root")


def check_flags(flags: list[str]) -> None:
    """Raises ConfigError for flags of train.py that are the launcher's to give, or that no script can hold."""
    for flag in flags:
        if flag.split("=")[0] == "--run":
            raise ConfigError("the run's folder is said before --, by --folder")
        if not flag.isprintable():
            raise ConfigError(f"{flag!r} holds a line break or another character that cannot be printed")


def check_training(options: Common, name: str, flags: list[str]) -> None:
    """Raises ConfigError for what train.py would refuse on these machines: a flag, a size that does not divide."""
    from training.flags import Options, parse  # these import jax
    from training.layout import axis_sizes

    plain, _, size = name.partition("@")
    given = Options(load(locate(plain), size), Path(options.folder))
    asked = parse(given, flags, program=f"python train.py {name}").experiment
    owners = [host for host in range(options.hosts) for _ in range(options.devices // options.hosts)]
    try:
        axis_sizes(asked.mesh, asked.data.B, asked.data.T, owners, asked.train.accumulate)
    except ValueError as error:
        raise ConfigError(f"{options.place} has {options.devices} devices: {error}, in a flag after --") from error


def default_folder(config: str) -> str:
    """runs/ and the config's name, as train.py has it."""
    name, at, size = config.partition("@")
    return f"runs/{Path(name).stem}{at}{size}"

"""Flags under which XLA compiles for the CPU at a third of the cost: tests compile far more than they compute."""

import importlib.util
import mmap
import pathlib
from collections.abc import Iterator

WANTED = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def flags() -> Iterator[str]:
    for name, value in WANTED.items():
        if known(name):
            yield f"--{name}={value}"


def known(flag: str) -> bool:
    """Whether this XLA has a flag; one that it does not know ends the process.

    Flags are registered by names that stand as strings of their own; a flag of old, in the list of reserved names.
    """
    spec = importlib.util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or []:
        for library in pathlib.Path(folder).glob("*.so"):
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
                if bytes_.find(b"\0" + flag.encode() + b"\0") >= 0:
                    return True
    return False

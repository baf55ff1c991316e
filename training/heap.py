"""Memory that the process keeps instead of giving it back to the system after every step."""

import ctypes
import importlib.util
import os
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_heap() -> bool:
    """Tells glibc to hold on to freed memory; True if it was told.

    XLA on CPU allocates a step's temporaries anew each time; above malloc's thresholds they come as fresh pages from
    the system, and every page costs a fault. For the quickstart model that is a fifth of the step's CPU time (142,000
    faults a step before, none after). The price is a resident set that stays at its peak.

    Call it at a process's begin. Once JAX has a backend it comes too late: a thread that has allocated has an arena of
    its own, from which what is large comes fresh and goes back whatever was said.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    never = -1
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: never, M_TOP_PAD: 2**26, M_ARENA_MAX: 1}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])


def cpu_alone() -> bool:
    """Whether JAX has the CPU and nothing else, without asking it: that would start XLA's threads."""
    said = os.environ.get("JAX_PLATFORMS")
    return said == "cpu" if said else not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))

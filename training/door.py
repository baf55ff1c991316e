"""What the commands' doors have in common: an error is a line on standard error, and so is an interruption."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from training.heap import cpu_alone, keep_heap


def failed(error: object, status: int = 2) -> int:
    """Says an error; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return status


def enter(main: Callable[[list[str]], int], interrupted: str) -> NoReturn:
    """Calls a door's `main` with the command line. interrupted: what is said, after that word, at Ctrl-C."""
    if cpu_alone():
        keep_heap()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print(f"\ninterrupted{interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read has left, as `head` does: without a word, as other tools end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more on its way out
        sys.exit(141)

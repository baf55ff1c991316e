"""What orbax and asyncio say of a write that failed, besides the error that they raise: pages."""

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

NOT_BEGUN = r"coroutine '\w*(serialize|write_).*' was never awaited"  # as orbax names its writers


def hush() -> None:
    """One failed save is one line: the error that is raised."""
    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_another_write)
    _hush_closed_loops()
    # Writes that had not begun when another failed: Python warns of them whenever they are collected.
    warnings.filterwarnings("ignore", NOT_BEGUN, RuntimeWarning)


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each failed write as pages of traceback; it also raises it, and we report that in one line."""
    return "orbax" not in Path(record.pathname).parts


def _not_another_write(record: logging.LogRecord) -> bool:
    """Of the writes that a full disk refuses orbax raises the first; asyncio logs the rest as never asked for: those
    of arrays by tensorstore, with its way to pass on an errno, and those of metadata by orbax's own coroutines."""
    text, error = record.getMessage(), str(record.exc_info[1] if record.exc_info else None)
    return "never retrieved" not in text or ("os_error_code=" not in error and not re.search(r"[\\/]orbax[\\/]", text))


def _hush_closed_loops() -> None:
    """When a write fails, orbax closes its event loop while other writes still call back into it, from threads that
    can tell nobody: Python would print a traceback for each, around the one line that says what happened."""
    previous = sys.unraisablehook
    if getattr(previous, "hushes", False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            previous(unraisable)

    hook.hushes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook

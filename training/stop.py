"""Signals that ask a run to stop: the loop sees the request, saves, and leaves."""

import collections
import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from training import processes

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers, Ctrl-C, Slurm's warning before the time limit


class Stop:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request that a loop can look at.

        with Stop() as stop:
            for step in ...:
                ...
                if stop.after(step):  # "SIGTERM", say
                    save and leave

    Of several processes each may get the signal, and all hear of it at the same step.
    The first signal sets `requested`. While the loop saves, a second SIGTERM or SIGINT of the same kind is answered
    with a line; a third ends the process at once, with the usual code 128 + signal. SIGUSR1 never ends it. Earlier
    handlers come back on leaving. Outside the main thread, where Python allows no handlers, there is only a notice.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._counts: collections.Counter[int] = collections.Counter()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals are not handled: this is not the main thread, so a signal ends the run unsaved")
            return self
        for kind in SIGNALS:
            self._previous[kind] = signal.signal(kind, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._previous.items():
            # None is a handler that was not installed from Python, and cannot be put back from it.
            signal.signal(kind, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def after(self, step: int) -> str | None:
        """The signal for which to leave when this step is done, if any. To be asked after every step."""
        return processes.stop_after(step, self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._counts[number] += 1
        if self.requested is None:
            self.requested = name
            _say(f"{name}: saving a checkpoint after this step, then leaving")
        elif number == signal.SIGUSR1 or self._counts[number] < 3:
            _say(f"{name}: a save is under way" + f"; a third {name} ends it unsaved" * (number != signal.SIGUSR1))
        else:
            _say(f"{name} for the third time: leaving at once")
            os._exit(128 + number)


def _say(text: str) -> None:
    """Straight to standard error: print is not safe inside a handler that may have interrupted a print."""
    try:
        os.write(2, f"\n{processes.name()}{text}\n".encode())
    except OSError:
        pass  # nobody listens

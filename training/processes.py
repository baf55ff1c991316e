"""Several processes that train one model together: how they begin, agree and end.

JAX's distributed runtime joins them: the first process holds a small store of keys, by which they tell each other what
no array holds. With one process nothing of this happens: every function here then answers at once.

A process that dies takes the others along, since none can make a step without it. They leave within `heartbeat` and a
few seconds, with one line and exit status 69; the same command goes on from the last checkpoint.
"""

import contextlib
import inspect
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import jax

from training.settings import ConfigError

if TYPE_CHECKING:
    from training.flags import Processes

logger = logging.getLogger(__name__)

LOST = 69  # exit status of a process that leaves because another is gone
BEAT_SECONDS = 1.0
WAIT_SECONDS = 600  # for the others to come
_DAY = 24 * 3600
_FAILED, _STOP = "engrax/failed", "engrax/stop"


def start(asked: "Processes") -> None:
    """Joins the others, where there are others; before anything looks at a device. Ends the program if none comes."""
    global _group
    given = asked.index is not None and asked.count != 1
    if not given and (asked.count == 1 or _detected() == 1):
        return
    wanted: dict[str, Any] = {  # JAX's patience ends in a crash with a stack trace; ours comes first, and is one line
        "initialization_timeout": WAIT_SECONDS + 60,
        "heartbeat_timeout_seconds": 2 * asked.heartbeat + 5,
        "shutdown_timeout_seconds": 60,
    }
    if given:
        if asked.index == 0:
            _refuse_busy_port(asked.coordinator or "")
        wanted |= {"coordinator_address": asked.coordinator, "num_processes": asked.count, "process_id": asked.index}
        wanted["cluster_detection_method"] = "deactivate"  # or Slurm would hand out one GPU a process
    known = inspect.signature(jax.distributed.initialize).parameters
    # Its own handler of SIGTERM would swallow the signal until we look; ours is in training/stop.py.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    together = threading.Event()
    threading.Thread(target=_impatient, args=(together,), daemon=True).start()
    try:
        jax.distributed.initialize(**{name: value for name, value in wanted.items() if name in known})
    except (RuntimeError, ValueError) as error:
        print(f"error: the processes did not find each other: {_first_line(error)}", file=sys.stderr)
        end(2)  # what was begun cannot be shut down
    together.set()
    _group = _Group(asked.heartbeat)
    if _group.index != 0:
        logging.getLogger("training").setLevel(logging.ERROR)  # the first process warns for all
    _group.watch()


def _impatient(together: threading.Event) -> None:
    if together.wait(10):
        return
    print("waiting for the other processes", file=sys.stderr, flush=True)
    if not together.wait(WAIT_SECONDS - 10):  # JAX would crash soon after
        print(f"error: not all processes have come in {WAIT_SECONDS} s: see what the others say", file=sys.stderr)
        end(LOST)


def _refuse_busy_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:  # JAX would crash
        raise ConfigError(
            f"processes.coordinator is {coordinator!r}: {_first_line(error)}; give another port"
        ) from None


def _detected() -> int:
    """How many processes the surroundings say there are, by JAX's own rules: 1 where they say nothing."""
    try:
        from jax._src import clusters  # to ask before joining: a job of one process must not wait for others

        kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Kubernetes cannot be asked: mostly a pod that is alone
            found = next((kind for kind in kinds if kind.is_env_present()), None)
        return 1 if found is None else found.get_process_count()
    except Exception as error:  # Kubernetes that does not answer, a name without an address
        logger.warning(
            "whether there are other processes could not be found out (%s: %s): training alone",
            type(error).__name__, _first_line(error),
        )  # fmt: skip
        return 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Group:
    """This process among several."""

    def __init__(self, heartbeat: float):
        from jax._src import distributed  # the store of keys has no public name; orbax reaches it the same way

        self.client: Any = distributed.global_state.client
        self.index, self.count = jax.process_index(), jax.process_count()
        self.heartbeat = heartbeat
        self.over = False
        self.farewells: list[Callable[[], object]] = []
        self._leaving = threading.Lock()
        self._step, self._signal = -1, ""  # the last step that was made here, and what to leave for
        self._last: int | None = None  # the step to leave after
        self._steps = threading.Lock()

    def watch(self) -> None:
        for work in (self._beat, self._hear_failure, self._hear_stop):
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True).start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self.over:
                # Who holds the keys is gone, or the way to it.
                logger.debug("%s: %s", work.__name__, error)
                self.leave(f"{self.name}process 0 is gone: leaving. {AGAIN}", LOST)

    def _beat(self) -> None:
        """Each process leaves a sign of life; the first one looks at them all."""
        seen: dict[str, tuple[str, float]] = {}
        for beat in range(sys.maxsize):
            self.client.key_value_set(f"engrax/alive/{self.index}", str(beat), allow_overwrite=True)
            time.sleep(BEAT_SECONDS)
            if self.index != 0:
                continue
            now = time.monotonic()
            for key, value in self.client.key_value_dir_get("engrax/alive/"):
                if key not in seen or seen[key][0] != value:
                    seen[key] = value, now
            for key, (_, since) in seen.items():
                if now - since > self.heartbeat:
                    gone = key.rpartition("/")[2]
                    text = f"process {gone} is gone, silent for {now - since:.0f} s: leaving. {AGAIN}"
                    self.tell_failure(text, LOST)
                    self.leave(self.name + text, LOST)

    def wait_for(self, key: str) -> str:
        while True:
            try:
                return self.client.blocking_key_value_get(key, _DAY * 1000)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _hear_failure(self) -> None:
        said = json.loads(self.wait_for(_FAILED))
        if said["index"] != self.index:
            self.leave(self.name + said["text"], said["status"])

    def tell_failure(self, text: str, status: int) -> None:
        with contextlib.suppress(Exception):  # another was first, or there is nobody to tell
            self.client.key_value_set(_FAILED, json.dumps({"index": self.index, "text": text, "status": status}))

    def leave(self, text: str, status: int) -> NoReturn:
        """Ends this process, whatever its other threads wait for."""
        self._leaving.acquire()  # never released: the first who speaks is the only one
        self.over = True
        os.write(2, f"{text}\n".encode())
        for farewell in self.farewells:
            with contextlib.suppress(Exception):
                farewell()
        if self.index == 0:
            time.sleep(1.0)  # the others read the reason from this process
        end(status)

    def let_the_watch_speak(self, error: BaseException | None) -> None:
        """Of an error of the runtime's. Often that is how a process first learns that another is gone, and it should
        say so, not show what broke."""
        while error is not None and not re.match(r"[A-Z_]+: ", str(error)):
            error = error.__cause__ or error.__context__
        if error is not None and "os_error_code" not in str(error):  # which is of a disk
            time.sleep(self.heartbeat + 3 * BEAT_SECONDS)

    # Signals. A process runs ahead of its devices, each by other numbers of steps. So the one that was asked tells all;
    # all hold still for a moment, compare how far they are, and go on to the step after the farthest.

    def _hear_stop(self) -> None:
        signal = self.wait_for(_STOP)
        with self._steps:
            self._last = max(Meeting("stop").exchange(self._step)) + 1
            self._signal = signal

    def stop_after(self, step: int, requested: str | None) -> str | None:
        with self._steps:
            self._step = step
            if self._last is not None:
                return self._signal if step >= self._last else None
        if requested is not None:
            with contextlib.suppress(Exception):  # said already
                self.client.key_value_set(_STOP, requested)
        return None

    @property
    def name(self) -> str:
        return f"process {self.index}: "


_group: _Group | None = None
AGAIN = "The same command goes on from the last checkpoint"


def count() -> int:
    return 1 if _group is None else _group.count


def index() -> int:
    return 0 if _group is None else _group.index


def first() -> bool:
    """Whether this process speaks and writes for all."""
    return index() == 0


def name() -> str:
    """What begins a line of this process on the terminal: "" where it is the only one."""
    return "" if _group is None else _group.name


def stop_after(step: int, requested: str | None) -> str | None:
    """The signal after which to leave at this step, if any: the same on all processes, whichever was asked.

    requested: the signal that this process has got. Called after every step.
    """
    return requested if _group is None else _group.stop_after(step, requested)


class Meeting:
    """Where all processes come again and again, each in the same thread, and tell each other something."""

    _made: dict[str, int] = {}

    def __init__(self, name: str):
        number = self._made[name] = self._made.get(name, 0) + 1
        self._name, self._times = f"engrax/{name}-{number}", 0

    def exchange(self, value: Any = None) -> list[Any]:
        """Waits for all, and returns what each has brought, by index: whatever JSON can hold."""
        if _group is None:
            return [value]
        client, key = _group.client, f"{self._name}/{self._times}"
        client.key_value_set(f"{key}/{_group.index}", json.dumps(value))
        client.wait_at_barrier(key, _DAY * 1000)
        if self._times > 0:  # who is here has read what was said last time
            client.key_value_delete(f"{self._name}/{self._times - 1}/{_group.index}")
        self._times += 1
        found = {int(at.rpartition("/")[2]): json.loads(text) for at, text in client.key_value_dir_get(f"{key}/")}
        return [found[n] for n in range(_group.count)]

    def of_first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, told to all. If it fails there, all of them end with it."""
        return self.exchange(make() if first() else None)[0]


def farewell(action: Callable[[], object]) -> None:
    """Something to do even if this process has to leave at once, because another is gone."""
    if _group is not None:
        _group.farewells.append(action)


def failed(error: Exception, text: object, status: int) -> int:
    """Says an error, and ends the other processes with it. Returns the status where there are none."""
    if _group is None:
        print(f"error: {text}", file=sys.stderr)
        return status
    _group.let_the_watch_speak(error)
    _group.tell_failure(f"process {_group.index} stopped: {text}", status)
    _group.leave(f"{_group.name}error: {text}", status)


@contextlib.contextmanager
def ended_together(*foreseen: type[Exception]) -> Iterator[None]:
    """An error that is not foreseen ends all processes; one that only tells that another is gone is not shown."""
    try:
        yield
    except KeyboardInterrupt:  # before there was something to save
        if _group is None:
            raise
        _group.tell_failure(f"process {_group.index} was interrupted", 130)
        _group.leave(f"{_group.name}interrupted", 130)
    except Exception as error:
        if _group is None or isinstance(error, foreseen):
            raise
        _group.let_the_watch_speak(error)
        said = traceback.format_exc().rstrip().replace("\n", f"\n{_group.name}")
        _group.tell_failure(f"process {_group.index} stopped: {type(error).__name__}, see what it printed", 1)
        _group.leave(_group.name + said, 1)


def finish(status: int) -> int:
    """Ends this process when all have come here. Returns the status where there is only one."""
    if _group is None:
        return status
    Meeting("end").exchange()  # while they wait for the first one's pictures, a death is still noticed
    _group.over = True
    jax.distributed.shutdown()
    end(status)


def end(status: int) -> NoReturn:
    """Without what Python does at its end, which would wait for threads that wait for others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def whole(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Arrays that lie over the processes, on the first device of the first process; on the others nothing."""
    from jax.experimental import multihost_utils

    found = {}
    for key, value in arrays.items():  # one at a time: the devices hold one more array, not one more model
        array = multihost_utils.process_allgather(value, tiled=True)
        if first():
            found[key] = jax.device_put(array, jax.local_devices()[0])
    return found

"""Processes that do not outlive what started them: an error, Ctrl-C, SIGTERM or a closed terminal ends them too."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come, to be taken as Ctrl-C is."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Children:
    """Starts processes in sessions of their own; those that run when its block ends by an exception are ended.

    Within the block SIGTERM and SIGHUP raise `Terminated`; not outside the main thread, and not where they are ignored,
    as SIGHUP is under nohup, or have handlers of another's. `stop` asks a process to end; what has not ended after
    `patience_s`, or when a second signal comes, is killed.
    """

    def __init__(self, stop: Callable[[subprocess.Popen], None] = subprocess.Popen.terminate, patience_s: float = 30.0):
        self.stop, self.patience_s = stop, patience_s
        self.started: list[subprocess.Popen] = []
        self._handlers: dict[signal.Signals, Any] = {}
        self._is_held, self._late = False, None

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """As `subprocess.Popen`."""
        with self._held():  # an exception between the start and the list would leave the process behind
            process = subprocess.Popen(command, start_new_session=True, **options)
            self.started.append(process)
        return process

    def __enter__(self) -> "Children":
        if threading.current_thread() is threading.main_thread():
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    self._handlers[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is not None:
                self._end([process for process in self.started if process.poll() is None])
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _end(self, running: list[subprocess.Popen]) -> None:
        until = time.monotonic() + self.patience_s
        try:
            with self._held():
                for process in running:
                    self.stop(process)
            for process in running:
                process.wait(max(0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _signalled(self, number: int, frame: Any) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        if not self._is_held:
            raise error
        self._late = error

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """A signal that comes within the block is raised at its end."""
        self._is_held, self._late = True, None
        try:
            yield
        finally:
            self._is_held = False
        if self._late is not None:
            raise self._late

"""Calls of foreign code: each on a thread, with one deadline, so that nobody waits for a slow one."""

from __future__ import annotations

import math
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")
_FIRST_PAUSE_S = 0.1
_MAX_THREADS = 256  # of the whole process: a call that hangs keeps its own


class CallPool(Generic[_Key, _Value]):
    """Runs calls and hands out their results: a value, or the exception that came instead.

    A call is given its deadline, on the clock of `time.monotonic`: `timeout` seconds after it was submitted.
    Not finished by then it results in a TimeoutError. Its thread cannot be stopped: it is left alone, and
    what it still returns is dropped. All that it keeps is the call; as a daemon it does not keep the process.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = min(timeout, threading.TIMEOUT_MAX)
        self._pending: dict[int, tuple[_Key, _Call[_Value]]] = {}
        self._finished: queue.SimpleQueue[tuple[int, _Value | BaseException]] = queue.SimpleQueue()
        self._submitted = 0
        self._detached: list[tuple[_Call[None], float]] = []

    @property
    def num_pending(self) -> int:
        """Calls without a result."""
        return len(self._pending)

    def submit(self, key: _Key, function: Callable[[float], _Value], *, run_inline: bool = False) -> None:
        """Call `function(deadline)`; `key` comes back with the result. With `run_inline` it is called here
        and now: no thread, no time-out.
        """
        self._submitted += 1
        call = _Call(self._submitted, function, time.monotonic() + self.timeout, self._finished)
        self._pending[call.number] = key, call
        if run_inline:
            call.finish(call.run())
            return
        try:
            _THREADS.submit(call)
        except RuntimeError as error:  # the system gives no thread
            call.finish(RuntimeError(f"{error}; {_THREADS.num_hanging()} calls hang"))

    def detach(self, function: Callable[[float], None]) -> None:
        """Call `function(deadline)` on a thread; of what it raises there is a warning."""
        self._detached = [(call, until) for call, until in self._detached if not call.over()]
        deadline = time.monotonic() + self.timeout
        # Late, it is made all the same: only the wait for it has an end.
        call = _Call[None](0, lambda _: warn_of_failure(function, deadline), math.inf, queue.SimpleQueue())
        try:
            _THREADS.submit(call)
        except RuntimeError as error:  # the system gives no thread
            warnings.warn(f"{error}; a call was left out", stacklevel=2)
        else:
            self._detached.append((call, deadline))

    def wait_detached(self) -> None:
        """Wait until all detached calls are over, or their time is; not where the interpreter ends, which has
        stopped their threads.
        """
        for call, deadline in [] if sys.is_finalizing() else self._detached:
            call.over(deadline - time.monotonic())
        self._detached = []

    def collect(
        self, at_least: int = 0, patience: float = math.inf
    ) -> list[tuple[_Key, _Value | BaseException]]:
        """The results since the last time; waits until there are `at_least` so many, or all that are pending,
        but no longer than `patience` seconds.
        """
        found: list[tuple[_Key, _Value | BaseException]] = []
        until = time.monotonic() + patience
        while self._pending:
            wait = len(found) < at_least and time.monotonic() < until
            nearest = min(until, *(call.deadline for _, call in self._pending.values()))
            timeout = nearest - time.monotonic() if wait else 0.0
            try:
                number, result = self._finished.get(timeout=max(timeout, 0.0))
            except queue.Empty:
                found += self._expired()
                if not wait:
                    break
                continue
            if number in self._pending:  # else it came too late
                found.append((self._pending.pop(number)[0], result))
        return found

    def _expired(self) -> list[tuple[_Key, _Value | BaseException]]:
        now = time.monotonic()
        late = [number for number, (_, call) in self._pending.items() if call.deadline <= now]
        found: list[tuple[_Key, _Value | BaseException]] = []
        for number in late:
            key, call = self._pending.pop(number)
            call.cancel()
            error = f"no {'answer' if call.begun else 'free thread'} within {self.timeout:g} s"
            if not call.begun:
                error += f"; {_THREADS.num_hanging()} calls hang, of {_THREADS.max_threads} that may run"
            found.append((key, TimeoutError(error)))
        return found


class _Call(Generic[_Value]):
    """All that a thread needs to know of a call, and all that one which hangs keeps alive."""

    def __init__(
        self,
        number: int,
        function: Callable[[float], _Value],
        deadline: float,
        finished: queue.SimpleQueue[tuple[int, _Value | BaseException]],
    ) -> None:
        self.number, self.deadline, self.begun = number, deadline, False
        self._function, self._finished = function, finished

    def run(self) -> _Value | BaseException:
        self.begun = True
        return try_call(self._function, self.deadline)

    def cancel(self) -> None:
        """Nobody waits any more: a thread that has not begun has nothing left to call."""
        self._function = _nothing

    def over(self, timeout: float = 0.0) -> bool:
        """Whether it is, within `timeout` seconds; for one whose result is not wanted."""
        try:
            self._finished.put(self._finished.get(timeout=max(timeout, 0.0)))
        except queue.Empty:
            return False
        return True

    def finish(self, result: _Value | BaseException) -> None:
        self._finished.put((self.number, result))


def warn_of_failure(function: Callable[[float], None], deadline: float = math.inf) -> None:
    """`function(deadline)`; of what it raises there is a RuntimeWarning."""
    result = try_call(function, deadline)
    if isinstance(result, BaseException):
        warnings.warn(str(result), RuntimeWarning, stacklevel=2)


def _nothing(deadline: float) -> Any:
    """What is left of a call that was cancelled."""


class _ThreadPool:
    """At most `max_threads` daemon threads, each for one call at a time. They start when none is free, and
    stay.
    """

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._running: set[_Call[Any]] = set()
        self._threads = 0
        self._free = 0  # threads without a call, less the calls that wait for one

    def submit(self, call: _Call[Any]) -> None:
        """Let a thread run and finish `call`; it may have to wait for one. RuntimeError if there is none."""
        with self._lock:
            if self._free <= 0 and self._threads < self.max_threads:
                try:
                    threading.Thread(target=self._work, daemon=True, name="mem1 call").start()
                except RuntimeError:
                    if not self._threads:
                        raise
                else:
                    self._threads += 1
                    self._free += 1
            self._free -= 1
            self._calls.put(call)

    def num_hanging(self) -> int:
        """Calls that run on after their deadline."""
        with self._lock:
            return sum(call.deadline <= time.monotonic() for call in self._running)

    def _work(self) -> None:
        while True:
            self._run(self._calls.get())

    def _run(self, call: _Call[Any]) -> None:
        with self._lock:
            self._running.add(call)
        late = time.monotonic() >= call.deadline  # it had to wait for a thread, and nobody waits for it now
        result = TimeoutError() if late else call.run()
        with self._lock:  # free before the result is known: the next call then finds this thread
            self._running.discard(call)
            self._free += 1
        call.finish(result)


_THREADS = _ThreadPool(_MAX_THREADS)


def try_call(function: Callable[..., _Value], *arguments: Any) -> _Value | BaseException:
    """The value, or the exception in its place (cancellations and exits too; not the user's Ctrl-C)."""
    try:
        return function(*arguments)
    except BaseException as error:  # an environment is foreign code: no error of it may lose the batch
        # Ctrl-C comes to the main thread; elsewhere the environment raised it itself.
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return error


def retry(
    function: Callable[[], _Value],
    retries: int,
    retryable: tuple[type[BaseException], ...] = (OSError,),
    deadline: float = math.inf,
) -> _Value:
    """`function()`, again up to `retries` times after a `retryable` error, each time after a longer pause
    that is over before `deadline` (on the clock of `time.monotonic`).
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return function()
        except retryable:
            if retries <= 0 or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        retries, pause = retries - 1, 2 * pause

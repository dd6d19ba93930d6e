"""Questions to environments: each on a thread, with one deadline, so that nobody waits for a slow one."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Answer = TypeVar("_Answer")
_FIRST_PAUSE_S = 0.1
_MOST_THREADS = 256  # of the whole process: a call that hangs keeps its own


class Calls(Generic[_Key, _Answer]):
    """Asks questions and hands out what became of them: an answer, or the exception that came instead.

    A question is given its deadline, on the clock of `time.monotonic`: `timeout` seconds after it was asked.
    Not answered by then it comes to a TimeoutError. Its thread cannot be stopped: it is left alone, and what
    it still says is dropped. All that it keeps is the question; as a daemon it does not keep the process.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = min(timeout, threading.TIMEOUT_MAX)
        self._pending: dict[int, tuple[_Key, _Call[_Answer]]] = {}
        self._answered: queue.SimpleQueue[tuple[int, _Answer | BaseException]] = queue.SimpleQueue()
        self._asked = 0

    @property
    def open(self) -> int:
        """Questions without an outcome."""
        return len(self._pending)

    def ask(self, key: _Key, question: Callable[[float], _Answer], *, run_inline: bool = False) -> None:
        """Ask for `key`. A `run_inline` question is answered here and now: no thread, no time-out."""
        self._asked += 1
        call = _Call(self._asked, question, time.monotonic() + self.timeout, self._answered)
        self._pending[call.number] = key, call
        if run_inline:
            call.tell(call.answer())
            return
        try:
            _THREADS.run(call)
        except RuntimeError as error:  # the system gives no thread
            call.tell(RuntimeError(f"{error}; {_THREADS.hanging()} calls hang"))

    def outcomes(self, at_least: int = 0) -> list[tuple[_Key, _Answer | BaseException]]:
        """What has come since the last time; waits until there are `at_least` so many, or all that are
        open.
        """
        found: list[tuple[_Key, _Answer | BaseException]] = []
        while self._pending:
            wait = len(found) < at_least
            nearest = min(call.deadline for _, call in self._pending.values())
            patience = nearest - time.monotonic() if wait else 0.0
            try:
                number, answer = self._answered.get(timeout=max(patience, 0.0))
            except queue.Empty:
                found += self._overdue()
                if not wait:
                    break
                continue
            if number in self._pending:  # else it came too late
                found.append((self._pending.pop(number)[0], answer))
        return found

    def _overdue(self) -> list[tuple[_Key, _Answer | BaseException]]:
        now = time.monotonic()
        late = [number for number, (_, call) in self._pending.items() if call.deadline <= now]
        found: list[tuple[_Key, _Answer | BaseException]] = []
        for number in late:
            key, call = self._pending.pop(number)
            call.forget()
            error = f"no {'answer' if call.begun else 'free thread'} within {self.timeout:g} s"
            if not call.begun:
                error += f"; {_THREADS.hanging()} calls hang, of {_THREADS.most} that may run"
            found.append((key, TimeoutError(error)))
        return found


class _Call(Generic[_Answer]):
    """All that a thread needs to know of a question, and all that one which hangs keeps alive."""

    def __init__(
        self,
        number: int,
        question: Callable[[float], _Answer],
        deadline: float,
        answered: queue.SimpleQueue[tuple[int, _Answer | BaseException]],
    ) -> None:
        self.number, self.deadline, self.begun = number, deadline, False
        self._question, self._answered = question, answered

    def answer(self) -> _Answer | BaseException:
        self.begun = True
        return outcome(self._question, self.deadline)

    def forget(self) -> None:
        """Nobody waits any more: if no thread has begun, none will ask."""
        self._question = _nothing

    def tell(self, answer: _Answer | BaseException) -> None:
        self._answered.put((self.number, answer))


def _nothing(deadline: float) -> Any:
    """The question that is left where one has been forgotten."""


class _Threads:
    """At most so many daemon threads, each for one call at a time. They start when none is free, and stay."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._running: set[_Call[Any]] = set()
        self._threads = 0
        self._free = 0  # threads without a call, less the calls that wait for one

    def run(self, call: _Call[Any]) -> None:
        """Let a thread answer `call` and tell; it may have to wait for one. RuntimeError if there is none."""
        with self._lock:
            if self._free <= 0 and self._threads < self.most:
                try:
                    threading.Thread(target=self._serve, daemon=True, name="mem1 call").start()
                except RuntimeError:
                    if not self._threads:
                        raise
                else:
                    self._threads += 1
                    self._free += 1
            self._free -= 1
            self._calls.put(call)

    def hanging(self) -> int:
        """Calls that run on after their deadline."""
        with self._lock:
            return sum(call.deadline <= time.monotonic() for call in self._running)

    def _serve(self) -> None:
        while True:
            self._answer(self._calls.get())

    def _answer(self, call: _Call[Any]) -> None:
        with self._lock:
            self._running.add(call)
        late = time.monotonic() >= call.deadline  # it had to wait for a thread, and nobody waits for it now
        answer = TimeoutError() if late else call.answer()
        with self._lock:  # free before it is heard: the next question then finds this thread
            self._running.discard(call)
            self._free += 1
        call.tell(answer)


_THREADS = _Threads(_MOST_THREADS)


def outcome(question: Callable[..., _Answer], *arguments: Any) -> _Answer | BaseException:
    """The answer, or the exception in its place (cancellations and exits too; not the user's Ctrl-C)."""
    try:
        return question(*arguments)
    except BaseException as error:  # a world is foreign code: no error of it may lose the batch
        # Ctrl-C comes to the main thread; elsewhere the world raised it itself.
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return error


def patiently(
    call: Callable[[], _Answer],
    retries: int,
    retryable: tuple[type[BaseException], ...] = (OSError,),
    deadline: float = math.inf,
) -> _Answer:
    """`call()`, again up to `retries` times after a `retryable` error, each time after a longer pause that is
    over before `deadline` (on the clock of `time.monotonic`).
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except retryable:
            if retries <= 0 or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        retries, pause = retries - 1, 2 * pause

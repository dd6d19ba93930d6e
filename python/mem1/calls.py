"""Questions to environments: each on a thread of its own, with a time-out, so that nobody waits for a slow
one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Answer = TypeVar("_Answer")
_FIRST_PAUSE_S = 0.1


class Calls(Generic[_Key, _Answer]):
    """Asks questions and hands out what became of them: an answer, or the exception that came instead.

    A question that is not answered within `timeout` seconds comes to a TimeoutError. Its thread cannot be
    stopped: it is left alone, what it still says is dropped, and as a daemon it does not keep the process.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = min(timeout, threading.TIMEOUT_MAX)
        self._pending: dict[int, tuple[_Key, float]] = {}  # call -> who asked, and the deadline
        self._answered: queue.SimpleQueue[tuple[int, _Answer | BaseException]] = queue.SimpleQueue()
        self._asked = 0

    def ask(self, key: _Key, question: Callable[[], _Answer], *, instant: bool = False) -> None:
        """Ask for `key`. An `instant` question is answered here and now: no thread, no time-out."""
        self._asked += 1
        call = self._asked
        self._pending[call] = key, time.monotonic() + self.timeout
        if instant:
            self._answer(call, question)
        else:
            threading.Thread(target=self._answer, args=(call, question), daemon=True).start()

    def outcomes(self, *, wait: bool = False) -> list[tuple[_Key, _Answer | BaseException]]:
        """What has come since the last time; with `wait` at least one, if anything has been asked at all."""
        found: list[tuple[_Key, _Answer | BaseException]] = []
        while self._pending:
            nearest = min(deadline for _, deadline in self._pending.values())
            patience = nearest - time.monotonic() if wait and not found else 0.0
            try:
                call, answer = self._answered.get(timeout=max(patience, 0.0))
            except queue.Empty:
                found += self._overdue()
                if found or not wait:
                    break
                continue
            if call in self._pending:  # else it came too late
                found.append((self._pending.pop(call)[0], answer))
        return found

    def _answer(self, call: int, question: Callable[[], _Answer]) -> None:
        self._answered.put((call, outcome(question)))

    def _overdue(self) -> list[tuple[_Key, _Answer | BaseException]]:
        now = time.monotonic()
        late = [call for call, (_, deadline) in self._pending.items() if deadline <= now]
        error = f"no answer within {self.timeout:g} s"
        return [(self._pending.pop(call)[0], TimeoutError(error)) for call in late]


def outcome(question: Callable[[], _Answer]) -> _Answer | BaseException:
    """The answer, or the exception in its place (cancellations and exits too; not the user's Ctrl-C)."""
    try:
        return question()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a world is foreign code: no error of it may lose the batch
        return error


def patiently(call: Callable[[], _Answer], retries: int) -> _Answer:
    """`call()`, again up to `retries` times after an OSError (ConnectionError, TimeoutError, ...), each time
    after a longer pause.
    """
    for attempt in range(retries):
        try:
            return call()
        except OSError:
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    return call()

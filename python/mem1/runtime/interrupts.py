"""Ctrl-C and SIGTERM as a run wants them: at once where nothing is lost, else at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the user's, the scheduler's


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work. `signum`: which one."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupts:
    """A `with` block in which SIGINT and SIGTERM raise `Interrupted`: within `allowed()` at once, else at the
    next `check()`. A second signal does not wait.

    Signals reach Python's main thread only; on another one nothing changes.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored, as Ctrl-C is in a shell's background job, stays so.
            # (None: a handler that is not Python's, which could not be put back.)
            handled = [signum for signum in SIGNALS if signal.getsignal(signum) not in (signal.SIG_IGN, None)]
            self._before = {signum: signal.signal(signum, self._arrived) for signum in handled}
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if kind is None:  # one that came in the last step
            self.check()

    @property
    def pending(self) -> int:
        """The signal that waits for the next `check`; 0: none."""
        return self._pending or 0

    def check(self) -> None:
        """Raise Interrupted, once, if a signal has come."""
        signum, self._pending = self._pending, None
        if signum is not None:
            raise Interrupted(signum)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Work that may be cut off anywhere."""
        try:
            self._allowed = True  # before the check, or one that comes in between would wait
            self.check()
            yield
        except Interrupted:
            self._pending = None
            raise
        finally:
            self._allowed = False
        self.check()  # foreign code may have caught what was raised

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        if self._allowed or self._pending is not None:
            self._allowed = False
            self._pending = signum
            raise Interrupted(signum)
        self._pending = signum
        notice = f"{signal.Signals(signum).name}: finishing this step; again to stop without it\n"
        # Not by print: the signal may have come in the middle of one. Whoever reads may be gone by it, too.
        with suppress(OSError):
            os.write(2, notice.encode())

"""The event loop on which coroutines of environments run: one for the process, on a thread of its own.

One loop, so that what they share (the connections of a client) may stay open from call to call and episode to
episode.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Awaitable
from math import inf
from typing import TypeVar

_Value = TypeVar("_Value")


class EventLoop:
    """An asyncio loop on a daemon thread, which starts with the first call."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # the thread stays behind

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Awaitable[_Value], deadline: float = inf) -> _Value:
        """Wait for the value, or raise what the coroutine raises. It is cancelled, and TimeoutError raised,
        once `time.monotonic()` has passed `deadline`. RuntimeError if a coroutine on this loop calls it: it
        would wait for itself.
        """
        loop = self._started()
        if asyncio._get_running_loop() is loop:
            raise RuntimeError("EventLoop.run: expected a call from another thread, got one from its own")
        future = asyncio.run_coroutine_threadsafe(_awaited(awaitable), loop)
        try:
            return future.result(None if deadline == inf else max(0.0, deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            if future.cancel():
                raise TimeoutError("the coroutine has not ended in time") from None
            return future.result()  # it ended meanwhile, perhaps by a TimeoutError of its own

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="mem1 event loop")
                thread.start()
            return self._loop


async def _awaited(awaitable: Awaitable[_Value]) -> _Value:
    return await awaitable


EVENT_LOOP = EventLoop()

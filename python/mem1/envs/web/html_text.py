"""From HTML to text, within a time limit that holds.

Pages are converted in processes of their own. A page of 200 kB, one tag with 16,000 attributes, keeps
trafilatura busy for nine seconds, for five of which it holds the interpreter's lock: on a thread it
would stop all others, and no thread can be stopped. What crashes on a page takes only its process with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections import deque
from pathlib import Path

from mem1.extras import extra

_PROGRAM = Path(__file__).with_name("html_worker.py")
_START_SECONDS = 60.0  # to load the packages


class HtmlConverter:
    """Converts pages, each in a process that is started when none is free, and kept. May be used from any
    thread. Processes end with `close`, with this object, or with the program.

    timeout: seconds for a page.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._idle: deque[_Worker] = deque()
        self._under_way: set[threading.Event] = set()
        weakref.finalize(self, _end, self._idle)

    def text(self, html: str, over: threading.Event | None = None) -> str | None:
        """The text of a page; None if it took too long, took the process down, or if another thread has set
        `over`, which says that nobody waits for it. Raises InputError if trafilatura cannot be loaded.
        """
        over = over or threading.Event()
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _started()
        self._under_way.add(over)
        text = worker.ask(html, self._timeout, over)
        self._under_way.discard(over)
        if text is None:
            worker.end()
        else:
            self._idle.append(worker)
        return text

    def close(self) -> None:
        """End all processes. Pages that are being converted have no text."""
        for over in [*self._under_way]:
            over.set()
        _end(self._idle)


class _Worker:
    """A process that runs html_worker.py, for one caller at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            start_new_session=True,  # an interrupt at the terminal is not meant for it
        )

    def ask(self, html: str | None, timeout: float, over: threading.Event) -> str | None:
        """The text of a page, or what is said without one at the start; None if none came in time, or before
        `over` was set. Sets it.
        """
        asked, answers = self._process.stdin, self._process.stdout
        assert asked and answers  # pipes
        self._answered = self._expired = False
        watch = threading.Thread(target=self._watch, args=(timeout, over), daemon=True)
        watch.start()
        line = ""
        try:
            if html is not None:
                asked.write(json.dumps(html) + "\n")
                asked.flush()
            line = answers.readline()
        except OSError:  # the process is no more
            pass
        finally:
            self._answered = True
            over.set()
            watch.join()  # from here on it is settled whether the time was over
        whole = line.endswith("\n") and not self._expired
        return str(json.loads(line)) if whole else None

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _watch(self, timeout: float, over: threading.Event) -> None:
        over.wait(timeout)
        if not self._answered:
            self._expired = True
            self._process.kill()


def _started() -> _Worker:
    worker = _Worker()
    if worker.ask(None, _START_SECONDS, threading.Event()) is None:
        worker.end()
        with extra("web", "mem1.envs.web"):
            raise ImportError("none that can be loaded", name="trafilatura")
    return worker


def _end(idle: deque[_Worker]) -> None:
    while idle:
        idle.pop().end()

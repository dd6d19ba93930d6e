"""How far long work is: bars on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from mem1.io import ignore_closed_pipe

_LINE_EVERY_S = 10.0


class Phase:
    """Work of `total` steps of which some may be done already; `advance` says that more are."""

    def __init__(
        self, name: str, total: int, done: int, show: Callable[[Phase], None], clock: Callable[[], float]
    ) -> None:
        self.name, self.total, self.done, self.note = name, total, done, ""
        self._first, self._show, self._clock = done, show, clock
        self._began = clock()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """`steps` more are done; `note` is what there is to say of them, such as a loss."""
        self.done += steps
        self.note = self.note if note is None else note
        self._show(self)

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return self._clock() - self._began

    def __str__(self) -> str:
        """ "warm start 350/1000, 8.1 a second, 1:20 left, loss 0.412"; at its end the time taken."""
        parts = [f"{self.name} {self.done}/{self.total}", self.pace(), self.note]
        return ", ".join(part for part in parts if part)

    def pace(self) -> str:
        """Steps a second (seconds a step where that is more) and the time left at this rate, or taken."""
        steps, seconds = self.done - self._first, self.seconds
        if steps <= 0 or seconds <= 0:
            return ""
        rate = f"{steps / seconds:.1f} a second" if steps >= seconds else f"{seconds / steps:.1f} s each"
        if self.done >= self.total:
            return f"{rate}, {_duration(seconds)}"
        return f"{rate}, {_duration((self.total - self.done) * seconds / steps)} left"


class Progress:
    """What a command says while it works.

    With `log` (a test's, a notebook's, a file's) everything is a plain line given to it; without, lines are
    printed, and where the output is a terminal phases are bars. In lines a phase says how far it is once in
    ten seconds. One that took as long leaves a line at its end, a shorter one nothing.

        progress = Progress()
        with progress.phase("warm start", total=1000) as phase:
            for loss in steps():
                phase.advance(note=f"loss {loss:.3f}")
        progress.log("done")
    """

    def __init__(
        self, log: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._log = clock, log
        console = Console(highlight=False, emoji=False, markup=False)
        self._bars: Bars | None = None
        if log is None and sys.stdout is not None and sys.stdout.isatty() and console.is_interactive:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}  {task.fields[note]}", markup=False),
                console=console,
                refresh_per_second=4,
                redirect_stderr=sys.stderr is not None
                and sys.stderr.isatty(),  # else it is someone's file, and stays one
            )
        self._open = 0  # phases; the bars are on the screen while there are some

    def log(self, line: str) -> None:
        """A line that stays."""
        if self._log is not None:
            self._log(line)
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)  # names of files may be any bytes
        with ignore_closed_pipe(sys.stdout):
            if self._bars is not None:
                self._bars.console.print(line, soft_wrap=True)
            else:
                print(line, flush=True)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        """A phase of `total` steps, `done` of them by an earlier run. Phases may lie inside one another."""
        if self._bars is None:
            phase = Phase(name, total, done, self._lines(), self._clock)
            yield phase
        else:
            with self._bar(self._bars, name, total, done) as show:
                phase = Phase(name, total, done, show, self._clock)
                yield phase
        if phase.seconds >= _LINE_EVERY_S:
            self.log(str(phase))

    def _lines(self) -> Callable[[Phase], None]:
        said = self._clock()

        def show(phase: Phase) -> None:
            nonlocal said
            # The last step's line comes with the end of the phase.
            if phase.done < phase.total and self._clock() - said >= _LINE_EVERY_S:
                said = self._clock()
                self.log(str(phase))

        return show

    @contextmanager
    def _bar(self, bars: Bars, name: str, total: int, done: int) -> Iterator[Callable[[Phase], None]]:
        task = bars.add_task(name, total=total, completed=done, pace="", note="")

        def show(phase: Phase) -> None:
            bars.update(task, completed=phase.done, pace=phase.pace(), note=phase.note)

        try:
            self._open += 1
            if self._open == 1:
                with ignore_closed_pipe(sys.stdout):
                    bars.start()
            yield show
        finally:  # an exception, too, gives the terminal back
            bars.remove_task(task)
            self._open -= 1
            if self._open == 0:
                with ignore_closed_pipe(sys.stdout):
                    bars.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

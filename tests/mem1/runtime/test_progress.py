"""Lines by a clock that the test turns, bars on a terminal of its own."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys

import pytest

from mem1.runtime.progress import Phase, Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def progress(clock, lines) -> Progress:
    return Progress(lines.append, clock)


def test_a_line_every_ten_seconds_and_one_at_the_end(progress, clock, lines):
    with progress.phase("warm start", total=200) as phase:
        for step in range(200):
            clock.now += 0.125
            phase.advance(note=f"loss {step}")
    assert lines == [
        "warm start 80/200, 8.0 a second, 0:15 left, loss 79",
        "warm start 160/200, 8.0 a second, 0:05 left, loss 159",
        "warm start 200/200, 8.0 a second, 0:25, loss 199",
    ]


def test_a_short_phase_says_nothing(progress, clock, lines):
    with progress.phase("a row", total=4) as phase:
        clock.now += 9.9
        phase.advance(4)
    with progress.phase("nothing to do", total=0):
        pass
    assert lines == []


def test_slow_steps_that_go_on_where_another_run_ended(progress, clock, lines):
    with progress.phase("updates", total=1000, done=900) as phase:
        clock.now += 65
        phase.advance()
        assert phase.pace() == "65.0 s each, 1:47:15 left"
        phase.advance(99)
    assert lines == [
        "updates 901/1000, 65.0 s each, 1:47:15 left",
        "updates 1000/1000, 1.5 a second, 1:05",
    ]


def test_phases_within_a_phase_have_clocks_of_their_own(progress, clock, lines):
    with progress.phase("updates", total=2) as outer:
        for _ in range(2):
            with progress.phase("episodes", total=2) as inner:
                for _ in range(2):
                    clock.now += 6
                    inner.advance()
            progress.log("learned")
            outer.advance(note="reward 0.5")
    assert lines == [
        "episodes 2/2, 6.0 s each, 0:12",
        "learned",
        "updates 1/2, 12.0 s each, 0:12 left, reward 0.5",
        "episodes 2/2, 6.0 s each, 0:12",
        "learned",
        "updates 2/2, 12.0 s each, 0:24, reward 0.5",
    ]


def test_an_exception_goes_through_and_says_nothing_more(progress, clock, lines):
    with pytest.raises(KeyboardInterrupt), progress.phase("steps", total=9) as phase:
        clock.now += 11
        phase.advance()
        clock.now += 11
        raise KeyboardInterrupt
    assert lines == ["steps 1/9, 11.0 s each, 1:28 left"]


@pytest.mark.parametrize(
    ("total", "done", "steps", "seconds", "expected"),
    [
        (10, 0, 0, 5.0, ""),  # no rate yet
        (10, 0, 1, 0.0, ""),
        (0, 0, 0, 5.0, ""),
        (10**12, 0, 10**6, 10.0, "100000.0 a second, 2777:46:30 left"),
        (4, 0, 6, 3.0, "2.0 a second, 0:03"),  # more than was said
    ],
)
def test_pace(clock, total, done, steps, seconds, expected):
    phase = Phase("x", total, done, lambda phase: None, clock)
    clock.now += seconds
    phase.advance(steps)
    assert phase.pace() == expected


WORK = """
import sys, time
from mem1.runtime.progress import Progress
progress = Progress()
with progress.phase("all", total=2) as phase:
    for i in range(2):
        with progress.phase("a [part]", total=3) as part:
            for _ in range(3):
                time.sleep(0.2)  # the bars are drawn four times a second
                part.advance(note="loss 0.5")
        progress.log(f"part {i} | done [with it] :smile:")
        print("a warning", file=sys.stderr)
        phase.advance()
    {then}
print("over")
"""


def command(then: str = "pass") -> list[str]:
    return [sys.executable, "-c", WORK.replace("{then}", then)]


def environment(**settings: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"} | settings


def on_a_terminal(arguments: list[str], interrupt_after: str = "", **settings: str) -> tuple[int, str]:
    """Exit status and all that is written to a terminal; Ctrl-C is typed once a text has come."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, arguments, environment(COLUMNS="80", LINES="24", **settings))
    written, typed = b"", not interrupt_after
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is closed
            piece = b""
        if not piece:
            break
        written += piece
        if not typed and interrupt_after.encode() in written:
            typed = True
            os.write(terminal, b"\x03")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def test_bars_on_a_terminal():
    status, written = on_a_terminal(command())
    assert status == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    assert "━" in plain and re.search(r"a \[part\] +\S+ +\d/3", plain) and "loss 0.5" in plain
    for i in range(2):
        assert f"part {i} | done [with it] :smile:" in plain
    assert plain.count("a warning") == 2
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, (
        "the cursor is hidden, and comes back"
    )
    assert plain.rstrip().endswith("over")


def test_ctrl_c_gives_the_terminal_back():
    status, written = on_a_terminal(command("time.sleep(60)"), interrupt_after="part 1")
    assert status == -signal.SIGINT and "KeyboardInterrupt" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert written.rindex("\x1b[?25h") < written.index("Traceback")


def test_plain_lines_on_a_terminal_that_can_do_no_more():
    status, written = on_a_terminal(command(), TERM="dumb")
    assert status == 0 and "\x1b" not in written and "part 1 | done" in written


def test_plain_lines_in_a_pipe():
    done = subprocess.run(command(), env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"part {i} | done [with it] :smile:" for i in range(2)] + ["over"]


def test_names_of_files_may_be_any_bytes():
    code = "from mem1.runtime.progress import Progress; Progress().log('a\\udcff\\u00e9')"
    for encoding, said in ("utf-8", "a\\udcff\u00e9\n"), ("ascii", "a\\udcff\\xe9\n"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            stdout=subprocess.PIPE,
            check=True,
        )
        assert done.stdout.decode() == said


def test_work_goes_on_when_nobody_reads(tmp_path):
    finished = tmp_path / "finished"
    process = subprocess.Popen(
        [*command("open(sys.argv[1], 'w').close()"), str(finished)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 0 and "Error" not in said
    assert finished.exists()


@pytest.mark.parametrize("where", [">&-", ">/dev/full", "| true"])
def test_work_goes_on_where_nothing_can_be_written(where, tmp_path):
    code = (
        "import time, sys; from mem1.runtime.progress import Progress\n"
        "p = Progress(); p.log('first'); time.sleep(0.2)\n"
        "with p.phase('work', 2) as phase: phase.advance(); p.log('second'); phase.advance()\n"
        "open(sys.argv[1], 'w').write('done')"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {tmp_path / 'done'} {where}"
    subprocess.run(["bash", "-c", command], check=False, capture_output=True, timeout=120)
    assert (tmp_path / "done").read_text() == "done"

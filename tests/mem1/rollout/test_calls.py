"""Calls on threads: results, errors, time-outs, retries."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from math import inf

import pytest

from mem1.rollout.call_pool import CallPool, _ThreadPool, retry, try_call


def running() -> int:
    return sum(thread.name == "mem1 call" for thread in threading.enumerate())


def raises(error: BaseException):
    def call(deadline: float = inf):
        raise error

    return call


def test_answers_and_errors_come_with_who_asked():
    calls: CallPool[str, int] = CallPool(timeout=30)
    calls.submit("a", lambda deadline: 1)
    calls.submit("b", raises(ValueError("no")))
    calls.submit("c", lambda deadline: 3, run_inline=True)
    found = {}
    while len(found) < 3:
        found.update(calls.collect(at_least=1))
    assert found["a"] == 1 and found["c"] == 3
    assert isinstance(found["b"], ValueError) and str(found["b"]) == "no"
    assert calls.collect() == [] == calls.collect(at_least=1)


def test_a_call_that_runs_inline_is_answered_on_this_thread_and_at_once():
    calls: CallPool[int, int] = CallPool(timeout=30)
    calls.submit(0, lambda deadline: threading.get_ident(), run_inline=True)
    assert calls.collect() == [(0, threading.get_ident())]
    calls.submit(0, lambda deadline: threading.get_ident())
    assert calls.collect(at_least=1)[0][1] != threading.get_ident()


def test_calls_run_side_by_side():
    """Each waits for all the others: asked one after the other, none would end."""
    together = threading.Barrier(8)
    calls: CallPool[int, int] = CallPool(timeout=30)
    for key in range(8):
        calls.submit(key, lambda deadline: together.wait(timeout=20))
    found = []
    while len(found) < 8:
        found += calls.collect(at_least=1)
    assert sorted(key for key, _ in found) == list(range(8))
    assert not any(isinstance(answer, Exception) for _, answer in found)


def test_a_call_past_its_deadline_is_given_up_and_its_late_result_dropped():
    gate = threading.Event()
    calls: CallPool[str, bool] = CallPool(timeout=0.5)
    calls.submit("slow", lambda deadline: gate.wait())
    assert calls.collect() == []
    ((key, error),) = calls.collect(at_least=1)
    assert key == "slow" and isinstance(error, TimeoutError)
    assert str(error) == "no answer within 0.5 s"
    gate.set()
    time.sleep(0.05)
    assert calls.collect() == []
    calls.submit("next", lambda deadline: True)
    assert calls.collect(at_least=1) == [("next", True)]


def test_waiting_ends_with_the_first_to_answer():
    gate = threading.Event()
    calls: CallPool[str, bool] = CallPool(timeout=30)
    calls.submit("slow", lambda deadline: gate.wait())
    calls.submit("quick", lambda deadline: True)
    assert calls.collect(at_least=1) == [("quick", True)]
    gate.set()
    assert calls.collect(at_least=1) == [("slow", True)]


@pytest.mark.parametrize(("error", "attempts"), [(ConnectionError("down"), 3), (ValueError("wrong"), 1)])
def test_only_an_oserror_is_asked_again(error, attempts, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    asked = []

    def call():
        asked.append(1)
        raise error

    assert try_call(lambda: retry(call, retries=2)) is error
    assert len(asked) == attempts
    assert pauses == [0.1, 0.2][: attempts - 1]


def test_the_first_success_ends_the_retries(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    answers = iter([TimeoutError(), ConnectionError(), "there"])

    def call():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry(call, retries=5) == "there"


def test_an_exit_on_a_thread_is_a_result_and_a_long_timeout_no_trouble():
    calls: CallPool[str, int] = CallPool(timeout=1e12)
    calls.submit("leaves", raises(SystemExit(3)))
    ((key, error),) = calls.collect(at_least=1)
    assert key == "leaves" and isinstance(error, SystemExit)
    with pytest.raises(KeyboardInterrupt):
        try_call(raises(KeyboardInterrupt()))


def test_a_call_knows_its_deadline():
    calls: CallPool[str, float] = CallPool(timeout=30)
    before = time.monotonic()
    calls.submit("a", lambda deadline: deadline)
    calls.submit("b", lambda deadline: deadline, run_inline=True)
    deadlines = [answer for _, answer in calls.collect(at_least=2)]
    assert len(deadlines) == 2 and all(before + 30 <= d <= time.monotonic() + 30 for d in deadlines)


def test_no_retry_after_the_deadline(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    began = []

    def call():
        began.append(clock[0])
        clock[0] += 1.0
        raise ConnectionError(f"attempt {len(began)}")

    for deadline, starts in ((4.0, [0.0, 1.1, 2.3, 3.7]), (3.6, [0.0, 1.1, 2.3]), (0.5, [0.0])):
        clock[0] = 0.0
        began.clear()
        assert str(try_call(lambda: retry(call, 99, deadline=deadline))) == f"attempt {len(starts)}"  # noqa: B023
        assert began == pytest.approx(starts)
        assert clock[0] == began[-1] + 1.0, "it paused in vain"


def test_what_is_worth_a_retry_is_named(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    class ReadTimeout(Exception):  # as httpx has it: no OSError
        pass

    errors = iter([ReadTimeout(), LookupError(), OSError()])

    def call():
        raise next(errors)

    error = try_call(lambda: retry(call, 9, (ReadTimeout, LookupError)))
    assert isinstance(error, OSError)


@pytest.fixture
def threads(monkeypatch):
    """The pool, small and new."""
    pool = _ThreadPool(8)
    monkeypatch.setattr("mem1.rollout.call_pool._THREADS", pool)
    return pool


def test_threads_are_used_again(threads):
    calls: CallPool[int, int] = CallPool(timeout=30)
    used = set()
    for n in range(50):
        calls.submit(n, lambda deadline: threading.get_ident())
        ((_, thread),) = calls.collect(at_least=1)
        used.add(thread)
    assert len(used) == 1


def test_calls_that_hang_keep_a_bounded_number_of_threads(threads):
    gate, before = threading.Event(), running()
    hang = lambda deadline: gate.wait()  # noqa: E731
    told = []
    for _ in range(4):
        calls: CallPool[int, bool] = CallPool(timeout=0.5)
        for n in range(16):
            calls.submit(n, hang)
        found = calls.collect(at_least=16)
        assert sorted(key for key, _ in found) == list(range(16)) and not calls.num_pending
        told += [str(error) for _, error in found if isinstance(error, TimeoutError)]
    assert running() - before == 8 == threads.num_hanging()
    assert told.count("no answer within 0.5 s") == 8
    assert told.count("no free thread within 0.5 s; 8 calls hang, of 8 that may run") == 56
    gate.set()
    calls = CallPool(timeout=30)
    for n in range(16):
        calls.submit(n, lambda deadline: True)
    assert [answer for _, answer in calls.collect(at_least=16)] == [True] * 16
    assert running() - before == 8
    while threads.num_hanging():
        time.sleep(0.001)


def test_a_call_may_wait_for_a_free_thread(threads):
    calls: CallPool[int, int] = CallPool(timeout=30)
    for n in range(40):
        calls.submit(n, lambda deadline, n=n: (time.sleep(0.01), n)[1])
    assert sorted(calls.collect(at_least=40)) == [(n, n) for n in range(40)]


def test_a_thread_that_cannot_be_started_is_the_result_of_its_call(threads, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    calls: CallPool[int, bool] = CallPool(timeout=30)
    calls.submit(0, lambda deadline: True)
    ((_, error),) = calls.collect(at_least=1)
    assert str(error) == "can't start new thread; 0 calls hang" and isinstance(error, RuntimeError)
    monkeypatch.setattr(threading.Thread, "start", start)
    calls.submit(0, lambda deadline: True)
    assert calls.collect(at_least=1) == [(0, True)]
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for n in range(5):  # the one that there is will do
        calls.submit(n, lambda deadline: True)
    assert len(calls.collect(at_least=5)) == 5


def test_a_call_that_hangs_keeps_its_function_alone():
    class Asker:
        pass

    gate, asker, calls = threading.Event(), Asker(), CallPool(timeout=0.05)
    calls.submit(asker, lambda deadline: gate.wait())
    ((key, _),) = calls.collect(at_least=1)
    gone = [weakref.ref(asker), weakref.ref(calls)]
    del asker, key, calls
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    gate.set()


def test_a_call_that_never_got_a_thread_keeps_nothing(threads):
    class World:
        def step(self, deadline: float) -> None:
            raise AssertionError("asked after its deadline")

    gate, calls = threading.Event(), CallPool(timeout=0.05)
    for n in range(8):
        calls.submit(n, lambda deadline: gate.wait())
    world = World()
    calls.submit(8, world.step)
    assert len(calls.collect(at_least=9)) == 9
    gone = weakref.ref(world)
    del world
    gc.collect()
    assert gone() is None
    gate.set()
    calls.submit(9, lambda deadline: True)
    assert calls.collect(at_least=1) == [(9, True)]


def test_an_interrupt_that_a_world_raises_on_a_thread_is_a_result():
    calls: CallPool[str, int] = CallPool(timeout=30)
    calls.submit("a", raises(KeyboardInterrupt()))
    ((_, error),) = calls.collect(at_least=1)
    assert isinstance(error, KeyboardInterrupt)

"""Questions on threads: answers, errors, time-outs, retries."""

from __future__ import annotations

import threading
import time

import pytest

from mem1.calls import Calls, outcome, patiently


def raises(error: BaseException):
    def question():
        raise error

    return question


def test_answers_and_errors_come_with_who_asked():
    calls: Calls[str, int] = Calls(timeout=30)
    calls.ask("a", lambda: 1)
    calls.ask("b", raises(ValueError("no")))
    calls.ask("c", lambda: 3, instant=True)
    found = {}
    while len(found) < 3:
        found.update(calls.outcomes(wait=True))
    assert found["a"] == 1 and found["c"] == 3
    assert isinstance(found["b"], ValueError) and str(found["b"]) == "no"
    assert calls.outcomes() == [] == calls.outcomes(wait=True)


def test_an_instant_question_is_answered_on_this_thread_and_at_once():
    calls: Calls[int, int] = Calls(timeout=30)
    calls.ask(0, threading.get_ident, instant=True)
    assert calls.outcomes() == [(0, threading.get_ident())]
    calls.ask(0, threading.get_ident)
    assert calls.outcomes(wait=True)[0][1] != threading.get_ident()


def test_questions_run_side_by_side():
    """Each waits for all the others: asked one after the other, none would end."""
    together = threading.Barrier(8)
    calls: Calls[int, int] = Calls(timeout=30)
    for key in range(8):
        calls.ask(key, lambda: together.wait(timeout=20))
    found = []
    while len(found) < 8:
        found += calls.outcomes(wait=True)
    assert sorted(key for key, _ in found) == list(range(8))
    assert not any(isinstance(answer, Exception) for _, answer in found)


def test_a_question_past_its_time_is_given_up_and_its_late_answer_dropped():
    gate = threading.Event()
    calls: Calls[str, bool] = Calls(timeout=0.05)
    calls.ask("slow", gate.wait)
    assert calls.outcomes() == []
    ((key, error),) = calls.outcomes(wait=True)
    assert key == "slow" and isinstance(error, TimeoutError)
    assert str(error) == "no answer within 0.05 s"
    gate.set()
    time.sleep(0.05)
    assert calls.outcomes() == []
    calls.ask("next", lambda: True)
    assert calls.outcomes(wait=True) == [("next", True)]


def test_waiting_ends_with_the_first_to_answer():
    gate = threading.Event()
    calls: Calls[str, bool] = Calls(timeout=30)
    calls.ask("slow", gate.wait)
    calls.ask("quick", lambda: True)
    assert calls.outcomes(wait=True) == [("quick", True)]
    gate.set()
    assert calls.outcomes(wait=True) == [("slow", True)]


@pytest.mark.parametrize(("error", "attempts"), [(ConnectionError("down"), 3), (ValueError("wrong"), 1)])
def test_only_an_oserror_is_asked_again(error, attempts, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    asked = []

    def call():
        asked.append(1)
        raise error

    assert outcome(lambda: patiently(call, retries=2)) is error
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

    assert patiently(call, retries=5) == "there"


def test_an_exit_on_a_thread_is_an_outcome_and_a_long_timeout_no_trouble():
    calls: Calls[str, int] = Calls(timeout=1e12)
    calls.ask("leaves", raises(SystemExit(3)))
    ((key, error),) = calls.outcomes(wait=True)
    assert key == "leaves" and isinstance(error, SystemExit)
    with pytest.raises(KeyboardInterrupt):
        outcome(raises(KeyboardInterrupt()))

"""Signals: at once where work may be cut off, at the next check elsewhere; the second one does not wait."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mem1.runtime.interrupts import Interrupted, Interrupts


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_waits_for_the_next_check(signum, capfd):
    before = signal.getsignal(signum)
    with Interrupts() as interrupts:
        interrupts.check()
        send(signum)
        done = True  # goes on
        with pytest.raises(Interrupted) as error:
            interrupts.check()
    assert done and error.value.signum == signum
    assert isinstance(error.value, KeyboardInterrupt)
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signum) == before


def test_it_raises_at_once_where_that_is_allowed():
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted), interrupts.allowed():
            send(signal.SIGTERM)
            raise AssertionError("not reached")
        interrupts.check()


def test_a_second_one_does_not_wait():
    with pytest.raises(Interrupted), Interrupts():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        raise AssertionError("not reached")


def test_a_pending_one_ends_what_may_be_cut_off_before_it_begins():
    with Interrupts() as interrupts:
        send(signal.SIGINT)
        with pytest.raises(Interrupted), interrupts.allowed():
            raise AssertionError("not reached")


def test_nobody_to_tell_is_no_reason_to_fail():
    """As in `mem1 train | tee log`, where tee dies of the same Ctrl-C."""
    kept = os.dup(2)
    try:
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            with pytest.raises(Interrupted):
                interrupts.check()
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_one_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            send(signal.SIGINT)
            interrupts.check()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_foreign_code_has_caught_is_raised_again():
    with Interrupts() as interrupts, pytest.raises(Interrupted), interrupts.allowed():
        try:
            send(signal.SIGTERM)
        except BaseException:  # noqa: B036
            caught = True
        assert caught


def test_one_in_the_last_step_ends_the_block():
    with pytest.raises(Interrupted), Interrupts():
        send(signal.SIGTERM)
    with pytest.raises(KeyError), Interrupts():  # what went wrong comes first
        send(signal.SIGTERM)
        raise KeyError


def test_on_another_thread_nothing_changes():
    handlers = []

    def work():
        with Interrupts() as interrupts:
            handlers.append(signal.getsignal(signal.SIGTERM))
            interrupts.check()

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]

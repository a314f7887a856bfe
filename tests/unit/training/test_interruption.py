import signal
import threading
import time

import pytest

from mlra_scale.training.interruption import STOP_SIGNALS, Interruption


def test_an_interrupt_that_is_lost_comes_again() -> None:
    with Interruption() as interruption:
        interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # The first one went under here; the loop's next check must not.
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            interruption.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_polite_signal_is_remembered_and_interrupts_nothing(number: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with Interruption() as interruption:
        assert not interruption.is_stop_asked()
        for _ in range(2):
            signal.raise_signal(number)
            assert interruption.is_stop_asked()
        interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interruption.is_stop_asked()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_handlers_are_put_back_after_an_error() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in STOP_SIGNALS}
    try:
        with pytest.raises(ValueError), Interruption() as interruption:
            signal.raise_signal(signal.SIGTERM)
            raise ValueError
        assert interruption.is_stop_asked()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [mine] * len(STOP_SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_stop_does_not_come_from_an_earlier_run() -> None:
    with Interruption() as first:
        signal.raise_signal(signal.SIGUSR1)
    with Interruption() as second:
        assert first.is_stop_asked() and not second.is_stop_asked()


def test_a_thread_leaves_the_handlers_alone() -> None:
    """Only the main thread may set them."""
    asked: list[bool] = []

    def run() -> None:
        with Interruption() as interruption:
            asked.append(interruption.is_stop_asked())

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False] and [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_does_not_cut_a_wait_short() -> None:
    """A rank in a collective is told in the middle of it, and goes on."""
    with Interruption() as interruption:
        started = time.monotonic()
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
        timer.start()
        time.sleep(0.5)
        timer.join()
        assert time.monotonic() - started >= 0.5 and interruption.is_stop_asked()

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mlra_scale.training import interruption as module
from mlra_scale.training.interruption import STOP_SIGNALS, Interruption

# How the thread that would end the process ends here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def no_process_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What would have been the process's exit code, instead of its end; none unless a test expects one."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit  # ends the thread

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    yield codes


def training() -> Interruption:
    """As it is while a run trains: there is something to save."""
    interruption = Interruption()
    interruption.limit(None)
    return interruption


def ends_with(codes: list[int]) -> list[int]:
    """Waits until the watching thread has ended the process."""
    deadline = time.monotonic() + 20
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    return codes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_first_signal_is_remembered_and_interrupts_nothing(
    number: signal.Signals, no_process_ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with training() as interruption:
        assert not interruption.is_stop_requested()
        for _ in range(2):  # the second SIGINT within a second is the same key press
            signal.raise_signal(number)
            assert interruption.is_stop_requested()
        shown = ""
        while "stops after this step" not in shown:
            shown += capfd.readouterr().err
    assert shown.count(number.name) == 1 and ("Ctrl-C again" in shown) == (number == signal.SIGINT)
    assert not no_process_ends


def test_a_second_ctrl_c_ends_the_run_and_signals_of_a_cluster_do_not(
    monkeypatch: pytest.MonkeyPatch, no_process_ends: list[int]
) -> None:
    monkeypatch.setattr(module, "_ONE_PRESS_SECONDS", 0.05)
    monkeypatch.setattr(module, "_KILL_SECONDS", 0.3)
    with training():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # The exception may be lost, in native code: the thread ends the process all the same.
        assert ends_with(no_process_ends) == [130]


def test_under_torchrun_a_second_ctrl_c_comes_as_sigterm(
    monkeypatch: pytest.MonkeyPatch, no_process_ends: list[int]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(module, "_ONE_PRESS_SECONDS", 0.05)
    monkeypatch.setattr(module, "_KILL_SECONDS", 0.1)
    with training():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # not after SIGINT: no key was pressed twice
            signal.raise_signal(number)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert ends_with(no_process_ends) == [130]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_training_any_signal_ends_the_process_at_once(
    number: signal.Signals, no_process_ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with Interruption():
        signal.raise_signal(number)
        assert ends_with(no_process_ends) == [5]
    assert capfd.readouterr().err == "stopped before training began: nothing was written\n"


def test_with_nothing_to_save_a_process_that_does_not_end_is_ended(no_process_ends: list[int]) -> None:
    with Interruption() as interruption:
        interruption.limit(0.3, code=7)
        signal.raise_signal(signal.SIGTERM)
        started = time.monotonic()
        assert ends_with(no_process_ends) == [7] and time.monotonic() - started > 0.2


def test_a_limit_that_comes_after_the_signal_counts_from_then(no_process_ends: list[int]) -> None:
    with training() as interruption:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert no_process_ends == [], "while it saves"
        interruption.limit(0.1)
        assert ends_with(no_process_ends) == [5]


def test_the_thread_hears_a_signal_while_the_main_thread_is_in_native_code(no_process_ends: list[int]) -> None:
    """The handler runs only when the interpreter is back; here it is in poll(), which Python begins anew."""
    with Interruption():
        ident = threading.main_thread().ident
        assert ident is not None
        threading.Timer(0.1, signal.pthread_kill, (ident, signal.SIGTERM)).start()
        reader, writer = os.pipe()
        select.select([reader], [], [], 1.0)
        os.close(reader)
        os.close(writer)
        assert ends_with(no_process_ends) == [5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_a_parent_has_ignored_stays_ignored(number: signal.Signals, no_process_ends: list[int]) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(number)
            assert not interruption.is_stop_requested()
        assert signal.getsignal(number) is signal.SIG_IGN and not no_process_ends
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back_after_an_error() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, mine) for number in STOP_SIGNALS}
    try:
        with pytest.raises(ValueError), training() as interruption:
            signal.raise_signal(signal.SIGTERM)
            raise ValueError
        assert interruption.is_stop_requested()
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == [mine] * len(STOP_SIGNALS)
        with training() as second:
            assert not second.is_stop_requested(), "a stop of an earlier run"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_thread_leaves_the_handlers_alone() -> None:
    """Only the main thread may set them."""
    asked: list[bool] = []

    def run() -> None:
        with Interruption() as interruption:
            asked.append(interruption.is_stop_requested())

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False] and [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_does_not_cut_a_wait_short() -> None:
    """As that of a rank in a collective."""
    with training() as interruption:
        started = time.monotonic()
        ident = threading.main_thread().ident
        assert ident is not None
        timer = threading.Timer(0.1, signal.pthread_kill, (ident, signal.SIGTERM))
        timer.start()
        time.sleep(0.5)
        timer.join()
        assert time.monotonic() - started >= 0.5 and interruption.is_stop_requested()

"""What the tests of the launcher's processes share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Puts the handlers of signals back, which a job, an agent or torchrun sets in the process of the tests."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

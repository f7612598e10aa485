"""A polite request to end: set by signals or by code, read by the loop between two updates."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether somebody asked this process to end after the current update."""

    def __init__(self) -> None:
        self._requested = False

    def request(self) -> None:
        """Ask for the end."""
        self._requested = True

    def requested(self) -> bool:
        """Whether the end was asked for."""
        return self._requested


@contextmanager
def stop_on_signals(stop: Stop, *, ignore_interrupt: bool = False) -> Iterator[None]:
    """While the context lasts, SIGTERM, SIGINT and SIGUSR1 request a stop; a second signal ends the process at once.

    Args:
        ignore_interrupt: for a worker whose parent forwards the request: Ctrl-C reaches both from the terminal, and would
            otherwise count twice.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested():
            # The interpreter may sit in a long kernel or a collective that never returns: only the default action ends it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.request()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        ignored = ignore_interrupt and number == signal.SIGINT
        signal.signal(number, signal.SIG_IGN if ignored else handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

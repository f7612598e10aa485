"""A polite request to end: set by signals or by code, read by the loop between two updates."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType


class Stop:
    """Whether somebody asked this process to end after the current update.

    Args:
        shared: an event of another process that asks for the same; None: only this process does.
    """

    def __init__(self, shared: Event | None = None) -> None:
        self._requested = False
        self._shared = shared

    def request(self) -> None:
        """Ask for the end."""
        self._requested = True

    def requested(self) -> bool:
        """Whether the end was asked for."""
        return self._requested or (self._shared is not None and self._shared.is_set())


@contextmanager
def stop_on_signals(stop: Stop, *, ignore: bool = False) -> Iterator[None]:
    """While the context lasts, SIGTERM, SIGINT, SIGHUP and SIGUSR1 request a stop; a second signal ends the process at once.

    Args:
        ignore: for a worker whose parent asks it to stop in another way: a signal to the whole process group, such as Ctrl-C in a
            terminal, reaches both, and must not count twice.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested():
            # The interpreter may sit in a long kernel or a collective that never returns: only the default action ends it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.request()

    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_IGN if ignore else handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A polite request to end: set by signals or by code, read by the loop between updates, and between batches of a validation.

The first signal asks. A second one ends the process at once, wherever it is. Python runs signal handlers in the main thread only,
and not while that sits in a kernel or in a collective that never returns; so a thread of its own, which the interpreter's C handler
wakes through a socket, counts them.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from types import FrameType

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
NUMBERS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))
# A preparation that does not react for so long sits in a library's loop; nothing of it is worth waiting for.
PREPARING_SECONDS = 5.0
# `timeout`, a shell and a scheduler signal a process and then its group: what follows so soon is the same request.
ECHO_SECONDS = 0.5
PARENT_SECONDS = 1.0
FIRST = "Finishing the update and saving; a second signal stops at once\n"
BEFORE = "Stopped before the first update\n"
SECOND = "Stopping now; the last checkpoint stays\n"


class Stopped(Exception):
    """Something that can be made again was cut short, because a stop was asked for."""


class Stop:
    """Whether somebody asked this process to end after the current update.

    Args:
        shared: an event of another process that asks for the same; None: only this process does.

    Attributes:
        listens: whether signals reach it.
        interrupts: whether a signal raises instead.
    """

    def __init__(self, shared: Event | None = None) -> None:
        self._requested = False
        self._shared = shared
        self.listens = False
        self.interrupts = False

    def request(self) -> None:
        """Ask for the end."""
        self._requested = True

    def requested(self) -> bool:
        """Whether the end was asked for."""
        return self._requested or (self._shared is not None and self._shared.is_set())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the context lasts, a signal raises KeyboardInterrupt or SystemExit: there is no update to finish yet."""
        before, self.interrupts = self.interrupts, True
        try:
            yield
        finally:
            self.interrupts = before


@contextmanager
def stop_on_signals(stop: Stop, *, quiet: bool = False) -> Iterator[None]:
    """While the context lasts, SIGTERM, SIGINT, SIGHUP and SIGUSR1 request a stop; a second signal ends the process at once.

    The exit code is then 128 and the signal's number, as a shell shows it. Only the main thread may enter.

    Args:
        quiet: whether a first signal is not answered with a line; for all ranks but the first.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.requested() and stop.interrupts:
            stop.request()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        stop.request()

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.getsignal(number) for number in NUMBERS}
    counting = threading.Thread(target=_count, args=(reader, stop, quiet), name="signals", daemon=True)
    counting.start()
    woken_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, handle)
    stop.listens = True
    try:
        yield
    finally:
        stop.listens = False
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        writer.close()
        counting.join()
        reader.close()


def stop_with_parent(stop: Stop) -> None:
    """Request a stop once the process that started this one is gone: nobody is left to hand a stop on, or to wait for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        stop.request()
        if stop.interrupts:
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def blocked_signals() -> Iterator[None]:
    """While the context lasts, signals that ask for a stop are kept back; a process started in it begins with them kept back."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """From now on leave stopping to the parent, which asks in another way.

    A signal to the whole process group, such as Ctrl-C in a terminal, reaches both, and must not count twice.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def _count(reader: socket.socket, stop: Stop, quiet: bool) -> None:
    """Wait for signals; end the process at the second, or when a preparation does not react to the first."""
    first, since = None, 0.0
    while True:
        try:
            received = reader.recv(64)
        except TimeoutError:
            if first is not None and stop.interrupts:
                os._exit(128 + first)
            reader.settimeout(None)
            continue
        if not received:
            return
        for number in _ours(received):
            if first is not None and time.monotonic() - since < ECHO_SECONDS:
                continue
            if first is not None:
                _say(SECOND)
                os._exit(128 + number)
            first, since = number, time.monotonic()
            if stop.interrupts:
                reader.settimeout(PREPARING_SECONDS)
            if not quiet:
                _say(BEFORE if stop.interrupts else FIRST)


def _ours(received: Iterable[int]) -> list[int]:
    """Other handlers of the process share the socket."""
    return [number for number in received if number in NUMBERS]


def _say(text: str) -> None:
    """Write past Python's buffers, whose locks the main thread may hold."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
    except (OSError, ValueError):
        return

"""The processes of a run on this machine, seen by the one that starts them: started, asked to stop, waited for, ended together.

Which failure was the cause is told from their own reports. A process whose partner dies fails too, within the same millisecond,
with an error that says nothing: such an error counts only if there is no other, and no death by a signal.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, current_process, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NoReturn

from llama_lab.config.errors import ConfigError
from llama_lab.training.errors import RunFailed
from llama_lab.training.processes.board import Board, Failure, failure_of, signal_name
from llama_lab.training.processes.stop import Stop, blocked_signals, ignore_signals

STOP_POLL_SECONDS = 0.2
# A process that does not end so long after another failed is stuck waiting for it.
GRACE_SECONDS = 3.0
# One that has said why it fails closes its tracker in the meantime.
CLOSING_SECONDS = 35.0
# Within it a process that lost contact learns what became of its partner.
REPORT_SECONDS = 2.0


def check_script(setting: str) -> None:
    """Refuse to start processes from a script that each of them would run again, down to this call.

    multiprocessing imports the main module in every process that it spawns, for what is defined there. Below
    `if __name__ == "__main__":` nothing is run by that.

    Args:
        setting: why there are to be processes.

    Raises:
        ConfigError: the script has no such line, or this is such a process and the call stands above it.
    """
    again = getattr(current_process(), "_inheriting", False)
    path = getattr(sys.modules["__main__"], "__file__", None)
    if not again and path is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # no source: frozen, or in an archive
            again = "__main__" not in Path(path).read_text(encoding="utf-8")
    if again:
        rule = 'starts processes that begin by running this script; put what it does below  if __name__ == "__main__":'
        raise ConfigError([(setting, rule)], scope="this script")


def run_ranks(
    target: Callable[..., None], arguments: tuple[Any, ...], *, processes: int, board: Board, stop: Stop, asked: Event | None
) -> None:
    """Run `target(rank, *arguments)` in a fresh process for each rank, and wait for all of them.

    Args:
        board: empty; where they report.
        stop: asks this process to stop.
        asked: passes it on to theirs, which then leave signals alone; None: nobody listens to signals.

    Raises:
        ConfigError, RunFailed: what the first of them failed with; the others are ended at once.
    """
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_rank, args=(target, rank, arguments, board, asked is not None), name=f"rank {rank}")
        for rank in range(processes)
    ]
    try:
        # Until a process ignores signals, one to the whole group would end it.
        with blocked_signals() if asked is not None else contextlib.nullcontext():
            for process in started:
                process.start()
        killed = _wait(started, board, stop, asked)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
    if failure := _cause([None if rank in killed else process.exitcode for rank, process in enumerate(started)], board):
        raise failure.error()


def end_rank(rank: int, board: Board, error: Exception) -> NoReturn:
    """End a process that another program started, after saying why: in its own words if it is the cause, else in a line.

    At once, past everything that Python and the collectives would do first, since the others wait until its connections are gone.
    """
    failure = failure_of(rank, error)
    if failure.is_consequence:
        deadline = time.monotonic() + REPORT_SECONDS
        while not (causes := [known for known in board.failures() if not known.is_consequence]) and time.monotonic() < deadline:
            time.sleep(STOP_POLL_SECONDS)
        why = f"rank {causes[0].rank} has failed" if causes else f"another rank is gone ({failure.message.partition('. ')[0]})"
        text = f"rank {rank} ends, because {why}"
    elif isinstance(error, ConfigError) and rank != 0 and _said_by_first(str(error), board):
        text = ""
    else:
        text = f"{failure.kind}: {error}" if isinstance(error, ConfigError | RunFailed) else failure.trace
    with contextlib.suppress(OSError):
        if text:
            print(text.rstrip(), file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(2 if isinstance(error, ConfigError) else 1)


def _said_by_first(message: str, board: Board) -> bool:
    """Whether the first process ends with the same message, or does so soon."""
    deadline = time.monotonic() + REPORT_SECONDS
    while not (said := [known.message for known in board.failures() if known.rank == 0]) and time.monotonic() < deadline:
        time.sleep(STOP_POLL_SECONDS)
    return message in said


def end_with_parent() -> None:
    """End this process when its parent is gone: the run's lock went with it, and another start may write into the folder."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _rank(target: Callable[..., None], rank: int, arguments: tuple[Any, ...], board: Board, ignores_signals: bool) -> None:
    """What a started process runs."""
    if ignores_signals:
        ignore_signals()
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        target(rank, *arguments)
    except BaseException as error:
        board.report(failure_of(rank, error))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)


def _wait(started: Sequence[BaseProcess], board: Board, stop: Stop, asked: Event | None) -> set[int]:
    """Wait for all processes. Returns the ranks that had to be killed, because they were stuck after another had failed."""
    killed: set[int] = set()
    failed_at: float | None = None
    while alive := [process for process in started if process.is_alive()]:
        connection.wait([process.sentinel for process in alive], timeout=STOP_POLL_SECONDS)
        if asked is not None and stop.requested():
            asked.set()
        failures = board.failures()
        if failed_at is None and (failures or any(process.exitcode for process in started)):
            failed_at = time.monotonic()
        if failed_at is not None:
            since, closing = time.monotonic() - failed_at, {failure.rank for failure in failures}
            for rank, process in enumerate(started):
                if since > (CLOSING_SECONDS if rank in closing else GRACE_SECONDS) and process.is_alive():
                    killed.add(rank)
                    process.kill()
    return killed


def _cause(exit_codes: list[int | None], board: Board) -> Failure | None:
    """What the failure of some processes began with; None if none has failed.

    Args:
        exit_codes: by rank; None where it says nothing.
    """
    failures = board.failures()
    if failures and not failures[0].is_consequence:
        return failures[0]
    reported = {failure.rank for failure in failures}
    for rank, code in enumerate(exit_codes):
        if code and rank not in reported:
            return Failure(rank, "", f"rank {rank} {_death(code)}; the others were ended")
    return failures[0] if failures else None


def _death(code: int) -> str:
    """How a process ended that did not say why."""
    if code >= 0:
        return f"ended with exit code {code} before it could say why; what it printed is above"
    name = signal_name(-code)
    hint = " (the system does that when memory runs out; see dmesg)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"

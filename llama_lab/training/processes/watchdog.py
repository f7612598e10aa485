"""Ends a process that makes no progress, and says which process of the run stands where.

A thread looks whether the loop has moved. Where it has not for too long, the thread writes every Python stack into train.log, has
the threads of the other processes do so too, says who is behind, and ends the process: a run that stands still costs more than one
that fails and is started again.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from llama_lab.training.processes.board import Board, Failure, Whereabouts

# Data is opened, kernels are compiled and checkpoints are read before the first update is done.
START_SECONDS = 1800.0
LONGEST_BEAT, SHORTEST_BEAT, BEATS = 5.0, 0.05, 20
# Beats that the others are given to show that they are alive.
ASKED = 4
PACKAGE = str(Path(__file__).parent.parent)
# Collectives, and the backward pass, in which gradients are exchanged.
WAITING = tuple(str(Path("torch", folder)) for folder in ("distributed", "autograd"))


class Watchdog:
    """Use it as a context around everything that a process does for its run.

    Args:
        rank: number of this process.
        seconds: without progress, after the first update, until the process is ended; None: it never is.
        log: train.log, which the stacks are written to.
        board: where the processes of the run see each other; None for one alone.
        settled: called once in the loop's thread, when the first update is done.
        failed: called with the message before the process ends.
    """

    def __init__(
        self,
        *,
        rank: int,
        seconds: float | None,
        log: Path,
        board: Board | None = None,
        settled: Callable[[], None] = lambda: None,
        failed: Callable[[str], None] = lambda message: None,
    ):
        self._rank, self._seconds = rank, seconds
        self._log, self._board = log, board
        self._settled, self._failed = settled, failed
        self._limit = None if seconds is None else max(seconds, START_SECONDS)
        self._interval = min(LONGEST_BEAT, max(SHORTEST_BEAT, (seconds or START_SECONDS) / BEATS))
        self._stage, self._steps, self._updates, self._beat, self.place = 0, 0, 0, 0, "the start"
        self._has_written_stacks = False
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if self._board is not None:
            self._board.leave(self._rank)

    def at(self, place: str) -> None:
        """Say where the loop is. All processes say the same places in the same order."""
        self.place = place
        self._stage += 1
        self._steps += 1

    def update(self, number: int) -> None:
        """Say that an update begins. Once one is done nothing is opened or compiled any more, and the short time-out holds."""
        if self._updates == 1:
            self._limit = self._seconds
            self._settled()
        self._updates += 1
        self.at(f"update {number}")

    def alive(self) -> None:
        """Say that the loop moves, within a place."""
        self._steps += 1

    def _watch(self) -> None:
        idle, seen, last = 0.0, -1, time.monotonic()
        self._show()  # so that the others know of this process from the start
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            # The clock goes on while a process is stopped, by Ctrl-Z or a scheduler; that it did not move then says nothing.
            idle = 0.0 if self._steps != seen else idle + min(now - last, 2 * self._interval)
            seen, last = self._steps, now
            self._show()
            if self._limit is not None and idle > self._limit:
                self._end(idle, seen)

    def _show(self) -> None:
        self._beat += 1
        if self._board is not None:
            self._board.show(self._rank, self._here())
            if self._board.are_stacks_asked_for():
                self._write_stacks("another process of this run has made no progress for too long")

    def _here(self) -> Whereabouts:
        place, waits = self._where()
        return Whereabouts(self._beat, self._stage, place, waits, os.getpid(), socket.gethostname())

    def _where(self) -> tuple[str, bool]:
        """The place with the innermost call of ours in the loop's thread, and whether that is a call that waits for others."""
        waits = False
        # Not extract_stack, which would read every source file.
        for frame, line in traceback.walk_stack(sys._current_frames().get(self._watched)):
            file = frame.f_code.co_filename
            if file.startswith(PACKAGE):
                return f"{self.place} ({frame.f_code.co_name}, {Path(file).name}:{line})", waits
            waits = waits or any(part in file for part in WAITING)
        return self.place, waits

    def _end(self, idle: float, seen: int) -> None:
        """End the process, unless the loop has left what was seen while the others were asked."""
        behind = self._behind(idle)
        if self._steps != seen or self._ended.is_set():
            return
        message = f"{behind} (hardware.timeout_seconds={self._seconds:g}); train.log has the Python stacks"
        if (error := self._write_stacks(message)) is not None:
            message += f", or would if it could be written ({error})"
        if self._board is not None:
            if self._board.failures():
                os._exit(1)  # another process has said it all, and waiting for it is why this one stands still
            # The stacks that tell most are those of the process that is behind, which is ended soon after this one has reported.
            self._board.ask_for_stacks()
            self._wait_for_others()
            if self._board.failures():
                os._exit(1)
            self._board.report(Failure(self._rank, "", message))
        self._failed(message)
        os.write(2, f"{message}\n".encode(errors="replace"))
        os._exit(1)

    def _wait_for_others(self) -> None:
        """Give the others time to answer; so does this process, which another one may be asking about just now."""
        for _ in range(ASKED):
            time.sleep(self._interval)
            self._show()

    def _write_stacks(self, why: str) -> OSError | None:
        """Append every Python stack of this process to train.log, once. Returns why it could not."""
        if self._has_written_stacks:
            return None
        try:
            with self._log.open("a", encoding="utf-8") as log:
                log.write(f"{why}\nrank {self._rank}: Python stacks\n")
                log.flush()
                faulthandler.dump_traceback(log)
        except OSError as error:
            return error
        self._has_written_stacks = True
        return None

    def _behind(self, idle: float) -> str:
        """Which process holds the others up."""
        known = {} if self._board is None else self._board.everybody()
        if self._board is not None:
            self._wait_for_others()
            now = self._board.everybody()
            silent = [rank for rank, was in sorted(now.items()) if rank != self._rank and was == known.get(rank)]
            if silent:
                return "; ".join(
                    f"rank {rank} (process {now[rank].process} on {now[rank].host}) does not answer any more; "
                    f"it was in {now[rank].place}"
                    for rank in silent
                )
            known = now
        known = known or {self._rank: self._here()}
        slowest = min(was.stage for was in known.values())
        late = {rank: was.place for rank, was in sorted(known.items()) if was.stage == slowest and not was.waits}
        late = late or {rank: was.place for rank, was in sorted(known.items()) if was.stage == slowest}
        if len(late) == 1:
            ((rank, place),) = late.items()
            return f"rank {rank} has made no progress for {idle:.0f} s; it is in {place}"
        places = ", ".join(f"rank {rank} in {place}" for rank, place in late.items())
        return f"ranks {', '.join(map(str, late))} have made no progress for {idle:.0f} s: {places}"

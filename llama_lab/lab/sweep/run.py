"""A sweep from its first job to its last: what starts next, what is stopped, what is tried again, and when it is over.

Nothing that matters lies in this process: jobs are frozen in the sweep's folder, and what they have done lies in their runs'. So it
can be killed at any moment, and another start finds out from there what is left.
"""

import re
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Direction, Search
from llama_lab.lab.runs.listing import RUNNING
from llama_lab.lab.runs.sweeps import STOPPED_EARLY
from llama_lab.lab.sweep import show
from llama_lab.lab.sweep.budget import keep_sweep_to_budget
from llama_lab.lab.sweep.data import refuse_changed_data, refuse_missing_data
from llama_lab.lab.sweep.frozen import (
    forget_first_words,
    freeze,
    hold_sweep,
    is_held,
    job_folder,
    keep_config,
    keep_outcome,
    known_outcome,
)
from llama_lab.lab.sweep.halving import Candidate, Halving
from llama_lab.lab.sweep.job_process import Request
from llama_lab.lab.sweep.jobs import BEFORE_START, Job, Outcome, Sweep
from llama_lab.lab.sweep.place import choose_place
from llama_lab.lab.sweep.ranking import ranking_problems, said_of_ranking
from llama_lab.training.metrics import short_time
from llama_lab.training.processes.stop import ECHO_SECONDS, NUMBERS
from llama_lab.training.run_folder import RunFolder, relative

POLL_SECONDS = 0.5
SAME_ERRORS = 3
"""A sweep whose first jobs all fail with one error has a mistake that the others share."""
INTERRUPTED = ("preempted", "interrupted", BEFORE_START)
SHOWN_LINES = 12
# A job that was asked to end and does not is ended when another exception ends the sweep.
PATIENCE_SECONDS = 20.0
# A job whose sweep was killed notices, saves its state and ends, soon after another start may have begun.
SAVING_SECONDS = 10.0
MICRO_BATCH = "hardware.micro_batch"


class StopRequest:
    """Signals that ask the sweep to end."""

    def __init__(self) -> None:
        self.count = 0
        self._last = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the context lasts, a signal counts instead of ending this process. What was ignored (nohup) stays ignored."""
        before = {number: signal.getsignal(number) for number in NUMBERS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # What follows so soon is the same request, sent to a process and to its group.
        if time.monotonic() - self._last > ECHO_SECONDS:
            self.count += 1
        self._last = time.monotonic()


def run(sweep: Sweep) -> int:
    """Run a sweep to its end and print what came of it; returns the exit code.

    Raises:
        ConfigError: it is running already, it is to stop or choose jobs by values that do not rank them, a job has nothing to
            train on, runs of it that are finished were trained on other data than there is now, it would take more than its
            budget, or this machine lacks what it needs.
    """
    if found := ranking_problems(sweep.settings, sweep.unranked):
        raise ConfigError(found, scope="this sweep")
    refuse_missing_data(sweep)
    refuse_changed_data(sweep)
    keep_sweep_to_budget(sweep)
    with hold_sweep(sweep.folder):
        freeze(sweep)
        return _Runner(sweep).run()


class _Runner:
    """One start of a sweep."""

    def __init__(self, sweep: Sweep):
        self._sweep = sweep
        for job in sweep.jobs:
            job.outcome = known_outcome(sweep, job)
        self._place = choose_place(sweep)
        self._board = show.Board(sweep)
        self._stop = StopRequest()
        self._halving = Halving(sweep.settings) if sweep.settings.halvings is not None else None
        self._candidates: dict[int, Candidate] = {}
        self._running: dict[int, tuple[Job, Any]] = {}
        self._waiting: deque[Job] = deque()
        self._verdicts: dict[int, str] = {}
        self._held: set[int] = set()
        self._requeued: dict[int, tuple[int, int]] = {}
        # Only while nothing of the sweep has ever worked can its first jobs say that nothing will.
        self._first_errors: list[str] | None = None if any(job.outcome.finished for job in sweep.jobs) else []
        self._gives_up = self._missed = False
        self._saving_until = time.monotonic() + SAVING_SECONDS
        self._stops_sent = 0
        self._proposer: Any = None
        if sweep.settings.search is Search.optuna:
            from llama_lab.lab.sweep.search import Proposer

            self._proposer = Proposer(sweep)

    def run(self) -> int:
        sweep, board = self._sweep, self._board
        left = [job for job in sweep.jobs if not job.outcome.decided]
        # What is half done goes first, so that a sweep that is stopped often has few such jobs.
        self._waiting.extend(sorted(left, key=lambda job: not job.outcome.updates))
        show.write_summary(sweep)
        done = len(sweep.jobs) - len(left)
        more = f" and {sweep.to_come} to come" if sweep.to_come else ""
        skipped = f", {done} of them done before" if done else ""
        if (
            sweep.settings.trials is not None
            and not sweep.to_come
            and len({job.point for job in sweep.jobs}) < sweep.settings.trials
        ):
            more = ", which is all the points there are"
        board.say(f"Sweep: {len(sweep.jobs)} jobs{more}{skipped}; {self._place.says}; {relative(sweep.folder)}", "bold")
        if (said := said_of_ranking(sweep.settings, [job.run for job in (*sweep.jobs, *sweep.bases)])) is not None:
            board.say(said)
        try:
            with self._stop.listening(), board.shown():
                while self._step():
                    self._place.wait(POLL_SECONDS)
        finally:
            self._end_all()
            show.write_summary(sweep)
        if self._proposer is not None:
            self._proposer.tell()
        return self._conclude()

    def _step(self) -> bool:
        """Look at everything once; whether there is more to do."""
        self._collect()
        if self._halving is not None:
            self._stop_early(self._halving)
        stopped = self._stop.count > 0
        if self._stop.count > self._stops_sent:
            self._stops_sent = self._stop.count
            if self._stop.count == 1 and self._running:
                self._board.say("Asking the running jobs to save and end; a second signal ends them at once")
            for _, started in self._running.values():
                started.stop()
        if not (stopped or self._gives_up):
            self._fill()
        self._board.refresh()
        return bool(self._running) or not (stopped or self._gives_up or not self._waiting)

    def _fill(self) -> None:
        """Start as many jobs as there is room for."""
        for job in list(self._waiting):
            if not self._place.room_for(job):
                continue
            if is_held(job.folder) and not self._place.has(job):
                if job.number not in self._held:
                    self._held.add(job.number)
                    self._board.tell(job, "is being trained by another process; waiting for it")
                if job.outcome.updates and time.monotonic() < self._saving_until:
                    # Of an earlier start, probably, and about to be let go; its room is not given away meanwhile.
                    return
                continue
            self._waiting.remove(job)
            if job.number in self._held and (known := known_outcome(self._sweep, job)).decided:
                self._settle(job, known)
            else:
                self._start(job)
        while self._proposer is not None and not self._waiting and self._place.room_for(self._sweep.jobs[0]):
            self._proposer.tell()
            jobs = [] if self._proposer.is_over else self._proposer.ask()
            if not jobs:
                return
            for job in jobs:
                # A run of that name may be there from elsewhere.
                job.outcome = known_outcome(self._sweep, job)
            self._waiting.extend(job for job in jobs if not job.outcome.decided)
            for job in [job for job in self._waiting if self._place.room_for(job) and not is_held(job.folder)]:
                if self._place.room_for(job):
                    self._waiting.remove(job)
                    self._start(job)

    def _start(self, job: Job) -> None:
        folder = job_folder(self._sweep, job)
        said = "started" if job.run.fresh or not RunFolder(job.folder).summary() else "started again"
        said = "found where an earlier start has left it" if self._place.has(job) else said
        request = Request(
            folder / "config.yaml", folder / "output.log", folder / "answer.json", ["llama-lab", "train", *job.overrides], job.slug
        )
        self._running[job.number] = (job, self._place.start(job, request))
        self._board.running[job.number] = time.monotonic()
        job.outcome = replace(job.outcome, status=RUNNING, folder=str(job.folder))
        show.write_summary(self._sweep)
        self._board.tell(job, said, "dim")

    def _collect(self) -> None:
        """Take in what has ended."""
        for number, (job, started) in list(self._running.items()):
            outcome = started.ended()
            if outcome is None:
                continue
            del self._running[number]
            self._place.done(started)
            seconds = time.monotonic() - self._board.running.pop(number)
            forget_first_words(self._sweep, job)
            self._settle(job, self._completed(job, outcome, seconds), seconds)

    def _completed(self, job: Job, outcome: Outcome, seconds: float) -> Outcome:
        """What a job answered, with what its run's files know beside it."""
        known = RunFolder(job.folder).summary()
        if outcome.status == BEFORE_START and known.get("update"):
            outcome.status = "interrupted"
        if not outcome.summary:
            outcome.summary, outcome.updates, outcome.tokens = known, known.get("update", 0), known.get("tokens", 0)
        if outcome.folder is None and known:
            outcome.folder = str(job.folder)
        outcome.summary.setdefault("seconds", round(seconds, 1))
        if job.number in self._verdicts and not outcome.finished and not outcome.failed:
            outcome.status = f"{STOPPED_EARLY} after update {outcome.updates}"
            outcome.message = self._verdicts[job.number]
        return outcome

    def _settle(self, job: Job, outcome: Outcome, seconds: float = 0.0) -> None:
        """Say what became of a job, and decide what follows from it."""
        if self._tries_again(job, outcome):
            job.outcome = replace(outcome, status="interrupted" if outcome.updates else "not started")
            return
        job.outcome = outcome
        keep_outcome(self._sweep, job)
        show.write_summary(self._sweep)
        if outcome.failed:
            self._show_failure(job, outcome)
        elif outcome.finished:
            self._look_for_objective(outcome)
            values = [
                f"{heading} {show.shown_value(key, outcome.summary[key])}"
                for key, heading in self._told()
                if key in outcome.summary
            ]
            took = f" in {short_time(seconds)}" if outcome.status == "finished" else " already"
            self._board.tell(job, ", ".join([f"finished{took}", *values]))
        else:
            at = f" after update {outcome.updates} of {job.run.updates}" if outcome.updates and not outcome.decided else ""
            self._board.tell(job, outcome.status + at)
        if outcome.failed or outcome.decided:
            self._count_errors(outcome)

    def _look_for_objective(self, outcome: Outcome) -> None:
        """Say once that what runs are compared by is not among what they measure."""
        objective = self._sweep.settings.objective
        if objective in outcome.summary or self._missed:
            return
        self._missed = True
        there = ", ".join(key for key in outcome.summary if "/" in key)
        self._board.say(f"sweep.objective={objective} is not among what this run measures: {there}", "bold yellow")

    def _told(self) -> list[tuple[str, str]]:
        objective = self._sweep.settings.objective
        return list({objective: show.objective_heading(self._sweep), "val/bits_per_byte": "bits/byte"}.items())

    def _tries_again(self, job: Job, outcome: Outcome) -> bool:
        """Whether a job goes back to those that wait: it ran out of memory, or its machine was taken away."""
        if self._stop.count or self._gives_up:
            return False
        if self._place.requeues and job.number not in self._verdicts and outcome.status in INTERRUPTED:
            before, times = self._requeued.get(job.number, (-1, 0))
            times = times + 1 if outcome.updates == before else 1
            self._requeued[job.number] = (outcome.updates, times)
            if times <= SAME_ERRORS:
                self._board.tell(job, f"was stopped after update {outcome.updates}; it is queued again")
                self._waiting.append(job)
                return True
            outcome.status, outcome.kind = "failed (no progress)", "no progress"
            outcome.message = (
                f"was stopped {times} times without getting beyond update {outcome.updates}; sweep.slurm.minutes=… gives more"
            )
        smaller = _smaller_micro_batch(job, outcome)
        if smaller is None:
            return False
        self._board.tell(job, f"out of memory; tried again with {MICRO_BATCH}={smaller}, which leaves the curve as it is", "yellow")
        job.run = replace(job.run, fresh=False, hardware=replace(job.run.hardware, micro_batch=smaller))
        keep_config(self._sweep, job)
        self._waiting.appendleft(job)
        return True

    def _show_failure(self, job: Job, outcome: Outcome) -> None:
        """The error at once, as the job itself printed it."""
        output = job_folder(self._sweep, job) / "output.log"
        self._board.tell(job, outcome.status, "bold red")
        lines = outcome.message.strip().splitlines() or ["(it said nothing)"]
        self._board.say("\n".join(f"    {line}" for line in lines[:SHOWN_LINES]))
        self._board.say(f"    everything it printed: {relative(output)}", "dim")

    def _count_errors(self, outcome: Outcome) -> None:
        """Give up where the first jobs all failed with one error."""
        if self._first_errors is None or len(self._first_errors) >= SAME_ERRORS:
            return
        self._first_errors.append(_signature(outcome) if outcome.failed else "")
        errors = self._first_errors
        if len(errors) == SAME_ERRORS and errors[0] and len(set(errors)) == 1:
            self._gives_up = True
            self._board.say(f"The first {SAME_ERRORS} jobs failed with the same error, so the others are not started", "bold red")
            for _, started in self._running.values():
                started.stop()

    def _stop_early(self, halving: Halving) -> None:
        """Stop running jobs that have fallen behind, and let go of others of their points that have not begun."""
        for job in self._sweep.jobs:
            if job.number not in self._candidates:
                self._candidates[job.number] = Candidate(job.values, job.run, job.folder)
        everyone = list(self._candidates.values())
        for number, (job, started) in self._running.items():
            if number in self._verdicts or (verdict := halving.look(self._candidates[number], everyone)) is None:
                continue
            settings = self._sweep.settings
            bound = f"{verdict.needed:.4f} or {'lower' if settings.direction is Direction.minimize else 'higher'}"
            said = f"{settings.objective} {verdict.value:.4f} after update {verdict.update}, where it took {bound} to go on"
            self._verdicts[number] = said
            self._board.tell(job, f"falls behind and is stopped: {said}", "yellow")
            started.stop()
            for other in [other for other in self._waiting if other.point == job.point]:
                self._waiting.remove(other)
                other.outcome = replace(other.outcome, status=f"{STOPPED_EARLY} with job {job.number}")
                keep_outcome(self._sweep, other)

    def _end_all(self) -> None:
        """Leave nothing running behind: only after an exception is there something."""
        for _, started in self._running.values():
            started.stop()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._running and time.monotonic() < deadline:
            for number, (_, started) in list(self._running.items()):
                if started.ended() is not None:
                    del self._running[number]
            time.sleep(POLL_SECONDS)
        for _, started in self._running.values():
            started.kill()

    def _conclude(self) -> int:
        sweep = self._sweep
        print()
        show.print_results(sweep)
        print(f"\nThe same as a file: {relative(sweep.folder / 'summary.csv')}")
        if not self._stop.count:
            show.write_report(sweep)
        if any(list(job.folder.glob("wandb/offline-run-*")) for job in sweep.jobs if job.run.wandb is not None):
            print(f"To send the offline runs to W&B: llama-lab track {relative(sweep.folder)}")
        failed = sum(job.outcome.failed for job in sweep.jobs)
        left = sum(not job.outcome.decided for job in sweep.jobs) - failed + sweep.to_come
        again = "the same command" if not any(job.run.fresh for job in sweep.jobs) else "the same command without fresh=true"
        again += f", or llama-lab sweep {relative(sweep.folder)},"
        if failed:
            print(f"{failed} of {len(sweep.jobs)} jobs failed; {again} tries them again and skips what is finished")
        if left and (self._stop.count or self._gives_up):
            print(f"{left} of {len(sweep.jobs) + sweep.to_come} jobs are not finished; {again} goes on with them")
        return 75 if self._stop.count and left else 1 if failed else 75 if left and not self._is_over() else 0

    def _is_over(self) -> bool:
        """Whether what is left is left because the search found no further point."""
        return self._proposer is not None and self._proposer.is_over


def _smaller_micro_batch(job: Job, outcome: Outcome) -> int | None:
    """Half the micro-batch that was too large for the memory; None if there is nothing to halve, or it is what the sweep varies."""
    if outcome.kind != "OutOfMemory" or MICRO_BATCH in job.values:
        return None
    # The run says what it tried, which hardware.micro_batch=auto alone does not tell.
    said = re.search(rf"{re.escape(MICRO_BATCH)}=(\d+)", outcome.message)
    known = job.run.hardware.micro_batch
    tried = int(said[1]) if said else known if isinstance(known, int) else job.run.windows_per_update
    return tried // 2 or None


def _signature(outcome: Outcome) -> str:
    """An error without what differs between jobs that fail for one reason: numbers, paths, values of fields."""
    return f"{outcome.kind}: {re.sub(r'=[^ ]+|[0-9][0-9.e+-]*|/[^ ]+', '#', outcome.message)[:500]}"

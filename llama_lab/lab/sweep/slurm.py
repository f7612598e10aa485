"""Jobs on a cluster, handed to Slurm by submitit. The sweep itself runs where it was typed, on a login node say, and watches.

Slurm's jobs outlive the process that handed them in: another start of the sweep finds them by the numbers that are written beside
their frozen configs. Near the end of its time a job is sent SIGUSR1, on which it saves its state; it is then queued again and goes
on.
"""

import json
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Device
from llama_lab.lab.sweep.frozen import job_folder
from llama_lab.lab.sweep.job_process import Request, be_job, read_answer
from llama_lab.lab.sweep.jobs import Job, Outcome, Sweep
from llama_lab.training.run_folder import write_json

SAVING_SECONDS = 120
"""Before the end of its time a job is told to save."""
# Slurm is asked so often which of our jobs it still has, all in one question; an answer is a file, and seen at once.
ASKED_SECONDS = 10.0
# A file system that several machines share may show an answer so much later than Slurm forgets its job.
ANSWER_SECONDS = 20.0
COMMAND_SECONDS = 30.0
TAKEN_AWAY = ("PREEMPTED", "NODE_FAIL", "REQUEUED", "TIMEOUT", "BOOT_FAIL", "CANCELLED")


class Queue:
    """What Slurm still has of ours."""

    def __init__(self) -> None:
        self._asked = 0.0
        self._there: set[str] | None = None

    def lacks(self, number: str, since: float) -> bool:
        """Whether Slurm is done with a job; false where it does not answer.

        Args:
            since: when the job was handed in; what was asked before says nothing.
        """
        if time.monotonic() - self._asked > ASKED_SECONDS:
            self._asked = time.monotonic()
            shown = _answer("squeue", "--noheader", "--me", "--format=%i")
            self._there = None if shown is None else set(shown.split())
        return self._asked > since and self._there is not None and number not in self._there


@dataclass
class Submitted:
    """A job that Slurm has.

    Attributes:
        job: submitit's view of it.
        queue: what Slurm still has.
        answer: where its outcome will be.
        record: where its number is written, for another start of the sweep.
    """

    job: Any
    queue: Queue
    answer: Path
    record: Path
    _since: float = field(default_factory=time.monotonic)
    _gone_since: float | None = None
    _is_asked_to_stop: bool = False

    def ended(self) -> Outcome | None:
        """How it ended, if it has."""
        if (outcome := read_answer(self.answer)) is not None:
            self.record.unlink(missing_ok=True)
            return outcome
        if self._gone_since is None:
            if self.queue.lacks(self.job.job_id, self._since):
                self._gone_since = time.monotonic()
            return None
        if time.monotonic() - self._gone_since < ANSWER_SECONDS:
            return None
        self.record.unlink(missing_ok=True)
        words = (_answer("sacct", "--noheader", "--allocations", "--format=State", f"--jobs={self.job.job_id}") or "").split()
        state = words[0] if words else "nothing"
        if state == "OUT_OF_MEMORY":
            return Outcome("failed (OutOfMemory)", kind="OutOfMemory", message="Slurm ended it: more memory than it had asked for")
        if self._is_asked_to_stop or state in TAKEN_AWAY:
            return Outcome("interrupted")
        said = f"Slurm's job {self.job.job_id} ended without a word, and Slurm says {state} of it; see {self.job.paths.stderr}"
        return Outcome(f"failed ({state})", kind=state, message=said)

    def stop(self) -> None:
        """Ask it to save its state and end; Slurm ends it for good soon after."""
        self._is_asked_to_stop = True
        with suppress(OSError):
            self.job.cancel(check=False)

    def kill(self) -> None:
        """End it."""
        self.stop()


class Slurm:
    """A cluster.

    Attributes:
        says: in words.
        requeues: whether a job that was stopped by nobody of ours is started again.

    Raises:
        ConfigError: submitit is not installed, or there is no Slurm here.
    """

    requeues = True

    def __init__(self, sweep: Sweep):
        self._submitit = _submitit()
        self._sweep, self._running, self._queue = sweep, 0, Queue()
        self._at_once = sweep.settings.at_once or len(sweep.jobs) + sweep.to_come
        self._settings = sweep.settings.slurm
        self._folder = sweep.folder / "slurm"
        self._executor = self._submitit.SlurmExecutor(folder=self._folder)
        self.says = f"at most {self._at_once} at once through Slurm"

    def room_for(self, job: Job) -> bool:
        """Whether a job can be handed in now."""
        return self._running < self._at_once

    def has(self, job: Job) -> bool:
        """Whether an earlier start has handed the job in."""
        return self._record(job).is_file()

    def start(self, job: Job, request: Request) -> Submitted:
        """Hand in a job, or find the one that an earlier start has handed in."""
        self._running += 1
        record = self._record(job)
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            found = self._submitit.SlurmJob(folder=self._folder, job_id=known["job"])
            return Submitted(found, self._queue, request.answer, record)
        request.answer.unlink(missing_ok=True)
        self._executor.update_parameters(**self._parameters(job))
        submitted = self._executor.submit(be_job, replace(request, threads=self._settings.cpus))
        write_json(record, {"job": submitted.job_id})
        return Submitted(submitted, self._queue, request.answer, record)

    def done(self, running: Submitted) -> None:
        """Free what a job had that has ended."""
        self._running -= 1

    def wait(self, seconds: float) -> None:
        """Wait so long."""
        time.sleep(seconds)

    def _record(self, job: Job) -> Path:
        return job_folder(self._sweep, job) / "slurm.json"

    def _parameters(self, job: Job) -> dict[str, Any]:
        """What sbatch is told of a job."""
        settings, processes = self._settings, job.run.hardware.processes or 1
        # Not submitit's own signal, on which it would give up what it cannot pickle: training listens to this one.
        options = {"signal": f"USR1@{min(SAVING_SECONDS, settings.minutes * 30)}"}
        options |= dict(option.split("=", 1) for option in settings.options)
        options |= {"partition": settings.partition} if settings.partition else {}
        options |= {"account": settings.account} if settings.account else {}
        return {
            "job_name": f"{job.run.name}-{job.number}",
            "time": settings.minutes,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": settings.cpus * processes,
            **({"gpus_per_node": processes} if job.run.hardware.device is Device.cuda else {}),
            **({"mem": f"{settings.memory_gib}GB"} if settings.memory_gib else {}),
            "additional_parameters": options,
        }


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        rule = "needs a package that is not installed: pip install 'llama_lab[slurm]'"
        raise ConfigError([("sweep.launcher=slurm", rule)], scope="this sweep") from None
    if shutil.which("sbatch") is None:
        rule = "finds no sbatch here; type it on a machine of the cluster that has it, or sweep.launcher=local"
        raise ConfigError([("sweep.launcher=slurm", rule)], scope="this sweep")
    return submitit


def _answer(*words: str) -> str | None:
    """What one of Slurm's commands prints; None if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

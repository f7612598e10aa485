"""Jobs on this machine: packed on its GPUs, or on the cores of its CPU.

On Linux a job on the CPU is forked from a process that has imported torch, and neither started threads nor touched a GPU: importing
takes longer than a small job may train. Elsewhere, and on a GPU, each job is a fresh process.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llama_lab.config import devices
from llama_lab.config.schema import Device, RunConfig
from llama_lab.lab.sweep.job_process import WARM, Request, be_job, read_answer
from llama_lab.lab.sweep.jobs import BEFORE_START, Job, Outcome, Sweep
from llama_lab.training.processes.stop import blocked_signals

THREADS = "OMP_NUM_THREADS"
KILLED = "was killed by the system, which had no memory left"


@dataclass
class Running:
    """A job that was started here.

    Attributes:
        gpus: those it has, as CUDA_VISIBLE_DEVICES names them.
        processes: of its run.
        oom_kills: how often the system had killed something for memory when it was started.
    """

    process: BaseProcess
    request: Request
    gpus: list[str]
    processes: int
    oom_kills: int
    asked: bool = field(default=False)

    def ended(self) -> Outcome | None:
        """How it ended, if it has."""
        if self.process.is_alive():
            return None
        self.process.join()
        code = self.process.exitcode or 0
        if (outcome := read_answer(self.request.answer)) is not None:
            return outcome
        if self.asked and code in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            return Outcome(BEFORE_START)
        if code == -getattr(signal, "SIGKILL", 9) and _oom_kills() > self.oom_kills:
            return Outcome("failed (OutOfMemory)", kind="OutOfMemory", message=KILLED)
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(f"failed ({reason})", kind=reason, message=f"its process ended without a word: {reason}")

    def stop(self) -> None:
        """Ask it to save its state and end; asked again, it ends at once."""
        self.asked = True
        with suppress(OSError, ValueError):
            self.process.terminate()

    def kill(self) -> None:
        """End it and whatever it started."""
        if os.name == "posix":
            with suppress(OSError):
                os.killpg(self.process.pid or 0, signal.SIGKILL)
        with suppress(OSError, ValueError):
            self.process.kill()


class Local:
    """What this machine has room for.

    Attributes:
        says: in words.
        requeues: whether a job that was stopped by nobody of ours is started again.
    """

    requeues = False

    def __init__(self, sweep: Sweep):
        runs = [job.run for job in sweep.jobs]
        self._running: list[Running] = []
        self._shared_by = sweep.settings.jobs_per_gpu
        self._gpus, self._cores = _gpus(runs), devices.usable_cores()
        self._at_once, self._each = packing(sweep)
        self.says = f"{self._at_once} at once on {self._place()}, {self._each} thread{'s' if self._each > 1 else ''} each"
        self._context = self._prepared(runs)

    def room_for(self, job: Job) -> bool:
        """Whether a job can be started now."""
        if len(self._running) >= self._at_once:
            return False
        return job.run.hardware.device not in (Device.cuda, Device.mps) or self._free(job.run) is not None

    def has(self, job: Job) -> bool:
        """Whether an earlier start has left the job running: none has, for jobs here end with their sweep."""
        return False

    def start(self, job: Job, request: Request) -> Running:
        """Start a job there is room for."""
        gpus = (self._free(job.run) or []) if job.run.hardware.device in (Device.cuda, Device.mps) else []
        environment = dict(os.environ) | {THREADS: str(self._each)}
        if job.run.hardware.device is Device.cuda:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        request = replace(request, environment=environment, threads=self._each)
        process: Any = self._context.Process(target=be_job, args=(request,), name=f"job {job.number}")
        # Meant for the process that jobs are forked from, which is started with the first of them, and which a signal to our whole
        # group must not end. OpenBLAS would start threads in it, and threads do not survive a fork.
        paths = os.pathsep.join(part for part in sys.path if part)
        variables = {THREADS: str(self._each), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths}
        with _environment(variables), blocked_signals():
            process.start()
        running = Running(process, request, gpus, job.run.hardware.processes or 1, _oom_kills())
        self._running.append(running)
        return running

    def done(self, running: Running) -> None:
        """Free what a job had that has ended."""
        self._running.remove(running)

    def wait(self, seconds: float) -> None:
        """Wait until a job ends, or so long."""
        if self._running:
            connection.wait([running.process.sentinel for running in self._running], timeout=seconds)
        else:
            time.sleep(seconds)

    def _place(self) -> str:
        if self._gpus:
            return f"{len(self._gpus)} GPU{'s' if len(self._gpus) > 1 else ''}"
        return f"{self._cores} CPU core{'s' if self._cores > 1 else ''}"

    def _prepared(self, runs: list[RunConfig]) -> Any:
        # Apple's libraries do not survive a fork, and what a GPU's job may fork from is not worth finding out.
        if self._gpus or not sys.platform.startswith("linux"):
            return multiprocessing.get_context("spawn")
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(WARM))
        # Started with the first process otherwise, and it would let signals through that are kept back just then.
        resource_tracker.ensure_running()
        return context

    def _free(self, run: RunConfig) -> list[str] | None:
        load = Counter(gpu for running in self._running for gpu in running.gpus)
        return choose_gpus(self._gpus, load, wanted=run.hardware.processes or 1, shared_by=self._shared_by)


def packing(sweep: Sweep) -> tuple[int, int]:
    """Jobs of a sweep that run side by side on this machine, and threads of the CPU that each process of them has."""
    runs = [job.run for job in sweep.jobs]
    gpus, cores, threads = _gpus(runs), devices.usable_cores(), os.environ.get(THREADS)
    widest = max(run.hardware.processes or 1 for run in runs)
    total = len(sweep.jobs) + sweep.to_come
    # A list is for regions within regions, of which there are none here.
    first = (threads or "").partition(",")[0].strip()
    each = int(first) if first.isdecimal() and int(first) else 1
    if gpus:
        room = max(1, len(gpus) * sweep.settings.jobs_per_gpu // widest)
    else:
        room = max(1, min(total, cores // (each * widest)))
    at_once = sweep.settings.at_once or min(room, total)
    return at_once, each if threads else max(1, cores // (at_once * widest))


def choose_gpus(gpus: list[str], load: Counter[str], *, wanted: int, shared_by: int) -> list[str] | None:
    """The GPUs that a job gets, those with the fewest jobs first; None if too few have room.

    Args:
        load: jobs that each GPU has.
        wanted: GPUs that the job takes.
        shared_by: jobs that may share a GPU.
    """
    free = sorted((gpu for gpu in gpus if load[gpu] < shared_by), key=lambda gpu: (load[gpu], gpus.index(gpu)))
    return free[:wanted] if len(free) >= wanted else None


def _gpus(runs: list[RunConfig]) -> list[str]:
    """The GPUs of this machine that jobs can be given, by the names that CUDA_VISIBLE_DEVICES has for them."""
    kinds = {run.hardware.device for run in runs}
    if Device.cuda in kinds:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = devices.probe_cuda().devices
        return [name.strip() for name in visible.split(",")][:count] if visible else [str(number) for number in range(count)]
    return ["mps"] if Device.mps in kinds else []


def _oom_kills() -> int:
    """How often the system has killed a process because memory ran out; 0 where it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables of our environment, for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

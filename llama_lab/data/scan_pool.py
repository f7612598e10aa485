"""Scanning many files on all cores.

What was scanned stays in a folder, so that a scan that was killed goes on with what is missing. Small files are scanned together.
The result does not depend on the number of processes. These are started without `multiprocessing`, which would run the script of
the caller again in each of them.
"""

import hashlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from llama_lab.config.devices import usable_cores
from llama_lab.config.errors import ConfigError
from llama_lab.data.clock import Clock
from llama_lab.data.corpus import Say
from llama_lab.data.near import signer_version
from llama_lab.data.reading import Progress, TextFile
from llama_lab.data.scan import Found, Job, Rules, Scan, after, is_enough, scan_job

# Raised when the same file gives other records.
FORMAT = 1
# Starting processes takes about a second; below this it is not worth it.
MANY_BYTES = 32_000_000
# Files are scanned together until they have so many bytes.
JOB_BYTES = 4_000_000
REPORT_SECONDS = 0.5
SERVE = "import sys; sys.path[:] = {path!r}; from llama_lab.data.scan_pool import serve; serve()"


def scan_files(
    files: list[TextFile], rules: Rules, folder: Path, limit: int | None, say: Say, processes: int | None = None
) -> Scan:
    """Scan files in their order, up to the one with which `limit` bytes have passed, on as many processes as pay.

    Args:
        folder: where results are kept, and found again.
        limit: None scans all files.
        processes: how many may be used; None is one for each core that this process may use.

    Raises:
        ConfigError: a file vanished, or a process ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.draft"):  # by a process that was killed
        left.unlink(missing_ok=True)
    jobs = _jobs(files, rules, folder, limit)
    done = {index: found for index, job in enumerate(jobs) if (found := job.result()) is not None}
    missing = [index for index in range(len(jobs)) if index not in done]
    size = sum(sum(jobs[index].sizes) for index in missing)
    clock = Clock("Read", size, say)
    prefix = _Prefix(jobs, done)
    several = min(len(missing), processes or usable_cores())
    if several < 2 or (processes is None and size < MANY_BYTES):
        read = 0
        for index in missing:
            if prefix.ends():
                break
            done[index] = scan_job(jobs[index], after(read, clock))
            read += sum(jobs[index].sizes)
    else:
        _scan_in_processes(jobs, missing, prefix, several, clock)
    ended = prefix.ends()
    found = [(jobs[index], done[index]) for index in range(prefix.jobs)]
    return Scan(found, not ended and all(one.complete for _, one in found))


def _jobs(files: list[TextFile], rules: Rules, folder: Path, limit: int | None) -> list[Job]:
    judged = asdict(rules) | {"length": rules.length and rules.length.name}
    groups: list[list[tuple[TextFile, os.stat_result]]] = []
    size = JOB_BYTES
    for file in files:
        try:
            stat = file.path.stat()
        except OSError as error:
            rule = f"cannot be read: {error.strerror or error}"
            raise ConfigError([(str(file.path), rule)], scope="the data") from error
        if size >= JOB_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((file, stat))
        size += stat.st_size
    jobs = []
    for index, group in enumerate(groups):
        seen = [[str(file.path.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in group]
        of = hashlib.sha256(json.dumps([FORMAT, seen, judged, signer_version() if rules.near else None]).encode()).hexdigest()
        sizes = tuple(stat.st_size for _, stat in group)
        jobs.append(Job(tuple(file for file, _ in group), sizes, rules, of, folder / f"{index:06}", limit))
    return jobs


class _Prefix:
    """The jobs that are done without a gap, from the first one on."""

    def __init__(self, jobs: list[Job], done: dict[int, Found]):
        self.done = done
        self.jobs = 0
        self._all = jobs
        self._passed_bytes = 0
        self._problems = 0

    def ends(self) -> bool:
        """Whether they are enough before the end of all."""
        while self.jobs in self.done and not self._enough():
            self._passed_bytes += self.done[self.jobs].passed_bytes
            self._problems += len(self.done[self.jobs].problems)
            self.jobs += 1
        return self._enough()

    def _enough(self) -> bool:
        return is_enough(self._passed_bytes, self._problems, self._all[0])


def _scan_in_processes(jobs: list[Job], missing: list[int], prefix: _Prefix, processes: int, clock: Clock) -> None:
    """Do the missing jobs in their order, each in a process."""
    workers = [_Worker() for _ in range(processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    read = dict.fromkeys(missing, 0)

    def do(index: int) -> Found:
        worker = idle.get()
        try:
            return worker.scan(jobs[index], lambda done: read.__setitem__(index, done))
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(processes)
    running: dict[Future[Found], int] = {}
    waiting = deque(missing)
    try:
        for worker in workers:
            idle.put(worker)
        while (waiting or running) and not prefix.ends():
            while waiting and len(running) < 2 * processes:
                index = waiting.popleft()
                running[threads.submit(do, index)] = index
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                prefix.done[index] = future.result()
                read[index] = sum(jobs[index].sizes)
            clock(sum(read.values()))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.end()
        threads.shutdown()


class _Worker:
    """A process that scans what it is asked to, one job at a time."""

    def __init__(self) -> None:
        words = [sys.executable, "-c", SERVE.format(path=sys.path)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def scan(self, job: Job, progress: Progress) -> Found:
        """Have a job done, and wait for it."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        try:
            pickle.dump(job, asked)
            asked.flush()
            while isinstance(answer := pickle.load(answers), int):
                progress(answer)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            rule = "ended before its time, perhaps for want of memory; run the command again, it goes on where it stopped"
            raise ConfigError([("A process that read the text", rule)], scope="the data") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what could not be sent to it
                    stream.close()


def serve() -> None:
    """What such a process does: take jobs from its standard input, and answer on its standard output.

    An answer is a number of bytes that were read, or what was found, or the error that came of it. The process ends when its input
    does, at once: so it outlives no parent, however that ends. Ctrl-C is the parent's business.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            answer: Any = scan_job(job, _Reports(answers))
        except OSError as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


def _take(jobs: "queue.SimpleQueue[Job]") -> None:
    while True:
        try:
            jobs.put(pickle.load(sys.stdin.buffer))
        except (EOFError, OSError, pickle.UnpicklingError):
            os._exit(0)


class _Reports:
    """Sends the bytes that were read so far, now and then."""

    def __init__(self, answers: BinaryIO):
        self._answers = answers
        self._sent = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._sent > REPORT_SECONDS:
            self._sent = now
            pickle.dump(done, self._answers)
            self._answers.flush()

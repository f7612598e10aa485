"""One pass over all files: what becomes of each item, its size and its digest, kept on disk a file at a time.

Flow: files -> items -> filters -> a record an item, on all cores. What was scanned stays in a folder, so that a scan that was
killed goes on with the files that are missing; small files are scanned together. The result does not depend on the number of
processes.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import CorpusConfig, Dedup, Length, OnError, Problem
from llama_lab.data.corpus import Say, words_digest
from llama_lab.data.near import HASHES, Signer, signer_version
from llama_lab.data.reading import Item, Progress, TextFile, read_items

# Raised when the same file gives other records.
FORMAT = 1
MAX_PROBLEMS = 10
SAY_SECONDS = 10.0
# Starting processes takes about a second each; below this it is not worth it.
MANY_BYTES = 32_000_000
# Files are scanned together until they have so many bytes.
JOB_BYTES = 4_000_000
BUFFERED_ITEMS = 4096
BLOCK_ITEMS = 1 << 20
# First character of the next class.
MEDIUM_CHARACTERS, LONG_CHARACTERS = 7_500, 12_001


class State(IntEnum):
    """What becomes of an item. The first two are the sides of `corpus`; all from `empty` on are dropped."""

    train = 0
    val = 1
    empty = 2
    broken = 3
    not_ascii = 4
    other_length = 5
    duplicate = 6
    near_duplicate = 7
    beyond = 8


RECORD = np.dtype([("state", "u1"), ("size", "<u8"), ("high", "<u8"), ("low", "<u8")])
"""An item: its state, the UTF-8 bytes of its text, and the two halves of the text's digest; zeros if it is dropped."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides on the state of an item by itself, out of a config.

    Attributes:
        stop: whether anything that cannot be read ends the preparation.
        near: whether signatures are taken.
    """

    field: str
    separator: str | None
    ascii_only: bool
    length: Length | None
    near: bool
    stop: bool

    @classmethod
    def of(cls, config: CorpusConfig, separator: str | None = None) -> "Rules":
        """The rules of a config."""
        near, stop = config.dedup is Dedup.near, config.on_error is OnError.stop
        return cls(config.text_field, separator, config.ascii_only, config.length, near, stop)

    def judge(self, text: str) -> State:
        """What becomes of a text; `train` if it passes."""
        if not text or text.isspace():
            return State.empty
        if self.ascii_only and not text.isascii():
            return State.not_ascii
        if self.length is not None and length_of(text) is not self.length:
            return State.other_length
        return State.train


def length_of(text: str) -> Length:
    """A text's length class."""
    if len(text) < MEDIUM_CHARACTERS:
        return Length.short
    return Length.medium if len(text) < LONG_CHARACTERS else Length.long


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a job's files after their scan; the records lie beside.

    Attributes:
        of: files and rules that it holds for.
        items: that were scanned, of each file that was begun.
        passed: items whose state is `train`.
        passed_bytes: UTF-8 bytes of their texts.
        complete: whether every file was read to its end.
        problems: the first of those that were met, each with the number of its item among those of the job.
    """

    of: str
    items: list[int]
    passed: int
    passed_bytes: int
    complete: bool
    problems: list[tuple[int, Problem]]


@dataclass(frozen=True, slots=True)
class Job:
    """Files to be scanned one after another.

    Attributes:
        sizes: of the files, in bytes.
        of: equal as long as a result holds.
        stem: path of the results, without their endings.
        limit: the scan ends with the item by which so many bytes have passed; None reads all.
    """

    files: tuple[TextFile, ...]
    sizes: tuple[int, ...]
    rules: Rules
    of: str
    stem: Path
    limit: int | None

    def result(self) -> Found | None:
        """What an earlier scan left, if it is whole and goes far enough."""
        try:
            found = Found(**json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8")))
            sizes = [self.stem.with_suffix(end).stat().st_size for end in (".items", ".signatures")]
        except (OSError, ValueError, TypeError):
            return None
        found = replace(found, problems=[(item, (subject, rule)) for item, (subject, rule) in found.problems])
        signed = found.passed * HASHES * 2 if self.rules.near else 0
        far_enough = found.complete or _ends(found.passed_bytes, len(found.problems), self)
        return found if sizes == [sum(found.items) * RECORD.itemsize, signed] and far_enough and found.of == self.of else None


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found in files, from the first on.

    Attributes:
        jobs: that were done, with what each found.
        complete: whether no file was left out or cut short.
    """

    jobs: list[tuple[Job, Found]]
    complete: bool

    @property
    def files(self) -> list[tuple[TextFile, int]]:
        """Every file that was begun, with the number of its items that were scanned."""
        return [pair for job, found in self.jobs for pair in zip(job.files, found.items, strict=False)]

    def problems(self, end: int) -> list[Problem]:
        """The first problems among so many items, in the order of the files."""
        found: list[Problem] = []
        start = 0
        for _, result in self.jobs:
            found += [problem for item, problem in result.problems if start + item < end]
            start += sum(result.items)
        return found[:MAX_PROBLEMS]

    @property
    def items(self) -> int:
        """Number of all items that were scanned."""
        return sum(sum(found.items) for _, found in self.jobs)

    def records(self) -> Iterator[tuple[int, np.ndarray]]:
        """Number of the first item among all, and the records, block by block."""
        start = 0
        for job, found in self.jobs:
            with job.stem.with_suffix(".items").open("rb") as file:
                left = sum(found.items)
                while left:
                    block = np.fromfile(file, RECORD, min(left, BLOCK_ITEMS))
                    yield start, block
                    start, left = start + len(block), left - len(block)


def scan_job(job: Job, progress: Progress) -> Found:
    """Read the files of a job and leave a record of every item.

    Args:
        progress: told the bytes of the files that were read so far; may raise to end the scan.
    """
    items, passed, passed_bytes = [], 0, 0
    complete = True
    problems: list[tuple[int, Problem]] = []
    before = 0
    signer = Signer() if job.rules.near else None
    with _Results(job.stem) as results:
        for file, size in zip(job.files, job.sizes, strict=True):
            items.append(0)
            for item in read_items(file, job.rules.field, job.rules.separator, progress=_after(before, progress)):
                row, words = _record(item, job.rules)
                if item.problem is not None:
                    problems = [*problems, (sum(items), item.problem)][:MAX_PROBLEMS]
                items[-1] += item.count
                if row[0] == State.train:
                    passed, passed_bytes = passed + 1, passed_bytes + row[1]
                results.add(row, item.count, None if signer is None or not words else signer.sign(words))
                if _ends(passed_bytes, len(problems), job):
                    complete = False
                    break
            if not complete:
                break
            before += size
        found = Found(job.of, items, passed, passed_bytes, complete, problems)
        results.finish(found)
    return found


class _Results:
    """The files that a job leaves, written under other names until they are whole."""

    def __init__(self, stem: Path):
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._stem = stem
        self._drafts = {end: stem.with_suffix(f".{os.getpid()}{end}") for end in (".items", ".signatures", ".json")}
        self._rows: list[tuple[int, int, int, int]] = []
        self._signatures: list[np.ndarray] = []
        self._files = [self._drafts[end].open("wb") for end in (".items", ".signatures")]

    def __enter__(self) -> "_Results":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()
        for draft in self._drafts.values():
            draft.unlink(missing_ok=True)

    def add(self, row: tuple[int, int, int, int], count: int, signature: np.ndarray | None) -> None:
        self._rows.extend([row] * count)
        if signature is not None:
            self._signatures.append(signature)
        if len(self._rows) >= BUFFERED_ITEMS:
            self._flush()

    def finish(self, found: Found) -> None:
        self._flush()
        for file in self._files:
            file.close()
        self._drafts[".json"].write_text(json.dumps(asdict(found)), encoding="utf-8")
        for end, draft in self._drafts.items():  # the .json, which says that the others are whole, last
            draft.replace(self._stem.with_suffix(end))

    def _flush(self) -> None:
        self._files[0].write(np.array(self._rows, RECORD).tobytes())
        self._files[1].write(np.array(self._signatures, np.uint16).tobytes())
        self._rows.clear()
        self._signatures.clear()


def _ends(passed_bytes: int, problems: int, job: Job) -> bool:
    """Whether enough was read, or enough is wrong."""
    return (job.limit is not None and passed_bytes >= job.limit) or (job.rules.stop and problems >= MAX_PROBLEMS)


def _after(before: int, progress: Progress) -> Progress:
    return lambda done: progress(before + done)


def _record(item: Item, rules: Rules) -> tuple[tuple[int, int, int, int], list[str]]:
    """The record of an item, and the words of its text if it passes."""
    state = State.broken if item.problem is not None else rules.judge(item.text)
    if state is not State.train:
        return (state, 0, 0, 0), []
    words = item.text.split()
    digest = words_digest(words)
    size = len(item.text) if item.text.isascii() else len(item.text.encode())
    return (state, size, int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")), words


def scan_files(
    files: list[TextFile], rules: Rules, folder: Path, limit: int | None, say: Say, processes: int | None = None
) -> Scan:
    """Scan files in their order, up to the one with which `limit` bytes have passed, on as many processes as pay.

    Args:
        folder: where results are kept, and found again.
        limit: None scans all files.
        processes: how many may be used; None is one a core.

    Raises:
        ConfigError: a file vanished, or a process ended.
    """
    jobs = _jobs(files, rules, folder, limit)
    done = {index: found for index, job in enumerate(jobs) if (found := job.result()) is not None}
    missing = [index for index in range(len(jobs)) if index not in done]
    size = sum(sum(jobs[index].sizes) for index in missing)
    clock = Clock("Read", size, say)
    prefix = _Prefix(jobs, done)
    several = min(len(missing), processes or os.cpu_count() or 1)
    if several < 2 or (processes is None and size < MANY_BYTES):
        read = 0
        for index in missing:
            if prefix.ends():
                break
            done[index] = scan_job(jobs[index], _after(read, clock))
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
        return _ends(self._passed_bytes, self._problems, self._all[0])


def _scan_in_processes(jobs: list[Job], missing: list[int], prefix: _Prefix, processes: int, clock: "Clock") -> None:
    """Do the missing jobs in their order, each in a process. What one has read is in a cell of a file; the first cell ends all."""
    path = jobs[0].stem.parent / "progress"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.memmap(path, np.uint64, "w+", shape=(len(jobs) + 1,))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start_worker)
    running: dict[Future[Found], int] = {}
    waiting = deque(missing)
    try:
        while (waiting or running) and not prefix.ends():
            while waiting and len(running) < 2 * processes:
                index = waiting.popleft()
                running[pool.submit(_work, jobs[index], path, index + 1)] = index
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                prefix.done[running.pop(future)] = future.result()
            clock(int(cells[1:].sum()))
    except BrokenProcessPool as error:
        rule = "ended before its time, perhaps for want of memory; run the command again, it goes on where it stopped"
        raise ConfigError([("A process that read the text", rule)], scope="the data") from error
    finally:
        cells[0] = 1
        pool.shutdown(cancel_futures=True)


class _EndedError(Exception):
    """What a process was reading is not needed any more."""


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends: a killed parent tells nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(job: Job, path: Path, cell: int) -> Found:
    cells = np.memmap(path, np.uint64, "r+")

    def progress(done: int) -> None:
        if cells[0]:
            raise _EndedError
        cells[cell] = done

    return scan_job(job, progress)


class Clock:
    """Says now and then how far a long work is; called with how much of it is done.

    Args:
        size: of all of it, in bytes, or in `unit` where one is given; None if nobody knows.
    """

    def __init__(self, verb: str, size: int | None, say: Say, unit: str | None = None):
        self._verb, self._size, self._say, self._unit = verb, size, say, unit
        self._start = self._said = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self._said < SAY_SECONDS:
            return
        self._said = now
        passed = now - self._start
        scale, unit = (1, self._unit) if self._unit else (1_000_000, "MB")
        of = left = ""
        if self._size is not None:
            of = f" of {self._size / scale:,.0f}"
            if 0 < done <= self._size:
                left = f", about {duration(passed * (self._size - done) / done)} left"
        self._say(f"{self._verb} {done / scale:,.0f}{of} {unit} in {duration(passed)}{left}")


def duration(seconds: float) -> str:
    """A time span in the two units that matter."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

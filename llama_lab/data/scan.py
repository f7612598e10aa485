"""What one reading finds out about each item of a file: its state by the filters, its size, its digest, perhaps a signature.

Flow: files -> items -> filters -> a record an item, on disk. `scan_pool` does it for many files.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np

from llama_lab.config.schema import CorpusConfig, Dedup, Length, OnError, Problem, TextConfig
from llama_lab.data.corpus import words_digest
from llama_lab.data.near import HASHES, Signer
from llama_lab.data.reading import Item, Progress, TextFile, read_items, with_unix_line_ends

MAX_PROBLEMS = 10
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
        near: whether signatures are taken.
        stop: whether anything that cannot be read ends the preparation.
        unix_line_ends: whether texts get them before anything else is known of them.
    """

    field: str
    separator: str | None
    ascii_only: bool
    length: Length | None
    near: bool
    stop: bool
    unix_line_ends: bool

    @classmethod
    def of(cls, config: CorpusConfig) -> "Rules":
        """The rules of a config."""
        near, stop = config.dedup is Dedup.near, config.on_error is OnError.stop
        separator, unix = (config.separator, config.unix_line_ends) if isinstance(config, TextConfig) else (None, False)
        return cls(config.text_field, separator, config.ascii_only, config.length, near, stop, unix)

    def items(self, file: TextFile, wanted: np.ndarray | None = None, progress: Progress = lambda done: None) -> Iterator[Item]:
        """Items of a file as they are judged, and later trained on; arguments as those of `read_items`."""
        for item in read_items(file, self.field, self.separator, wanted, progress):
            yield item._replace(text=with_unix_line_ends(item.text)) if self.unix_line_ends else item

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
        far_enough = found.complete or is_enough(found.passed_bytes, len(found.problems), self)
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
            for item in job.rules.items(file, progress=after(before, progress)):
                row, words = _record(item, job.rules)
                if item.problem is not None:
                    problems = [*problems, (sum(items), item.problem)][:MAX_PROBLEMS]
                items[-1] += item.count
                if row[0] == State.train:
                    passed, passed_bytes = passed + 1, passed_bytes + row[1]
                results.add(row, item.count, None if signer is None or not words else signer.sign(words))
                if is_enough(passed_bytes, len(problems), job):
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
        self._drafts = {end: stem.with_suffix(f".{os.getpid()}{end}.draft") for end in (".items", ".signatures", ".json")}
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


def is_enough(passed_bytes: int, problems: int, job: Job) -> bool:
    """Whether enough was read, or enough is wrong."""
    return (job.limit is not None and passed_bytes >= job.limit) or (job.rules.stop and problems >= MAX_PROBLEMS)


def after(before: int, progress: Progress) -> Progress:
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

"""Which of the scanned documents are kept, and on which side: duplicates, the limit in bytes, the split.

All that is held of a document is a byte, in a file; what needs to be compared is sorted a part at a time. So memory stays bounded.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import CorpusConfig, Dedup
from llama_lab.data.clock import Clock
from llama_lab.data.corpus import Document, Say, Side
from llama_lab.data.near import BANDS, BUCKET_ITEMS, Signatures, bucket_of, near_duplicates
from llama_lab.data.reading import TextFile
from llama_lab.data.scan import Rules, Scan, State

# Below it a document is too large a share to be held out by chance.
MIN_DOCUMENTS = 20
DROPPED = {
    State.empty: "empty",
    State.broken: "broken",
    State.not_ascii: "not_ascii",
    State.other_length: "other_length",
    State.duplicate: "duplicates",
    State.near_duplicate: "near_duplicates",
}
"""Why an item is dropped -> its key in the counts."""
STATES = "states"


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of a scan.

    Attributes:
        of: the scan and the rules that it holds for.
        files_items: items of each file that was begun.
        files_kept: how many of them are kept.
        items: items up to the last one that counts.
        text_bytes: UTF-8 bytes of what is kept.
        counts: as in `Corpus`.
    """

    of: str
    files_items: list[int]
    files_kept: list[int]
    items: int
    text_bytes: int
    counts: dict[str, int]

    @property
    def kept(self) -> int:
        """Documents that are kept."""
        return self.counts["kept"]


def select(scan: Scan, config: CorpusConfig, folder: Path, say: Say) -> Selection:
    """Decide on every item of a scan; the states lie in `folder` afterwards, where they are found again.

    What repeats an earlier document, white space aside, is dropped, then what is near one; then what follows the document with
    which `max_bytes` are reached. From `MIN_DOCUMENTS` on, a document is held out if the hash of its text falls into the first
    `val_fraction` of all hashes; so it stays on its side when the files grow. Below, all are on the training side.
    """
    wanted = [config.dedup and config.dedup.name, config.max_bytes, config.val_fraction]
    of = hashlib.sha256(json.dumps([wanted, [(job.of, found.items) for job, found in scan.jobs]]).encode()).hexdigest()
    marker = folder / "selection.json"
    try:
        before = Selection(**json.loads(marker.read_text(encoding="utf-8")))
        if before.of == of and (folder / STATES).stat().st_size == scan.items:
            return before
    except (OSError, ValueError, TypeError):
        pass
    marker.unlink(missing_ok=True)
    if not scan.items:
        return Selection(of, [], [], 0, 0, {"read": 0, "kept": 0})
    states = np.memmap(folder / STATES, np.uint8, "w+", shape=(scan.items,))
    for start, block in scan.records():
        states[start : start + len(block)] = block["state"]
    if config.dedup is not None:
        _drop_duplicates(scan, states)
    if config.dedup is Dedup.near:
        _drop_near(scan, states, folder, say)
    end, text_bytes = _limit(scan, states, config.max_bytes)
    kept = int((states == State.train).sum())
    if kept >= MIN_DOCUMENTS:
        _hold_out(scan, states, config.val_fraction)
    items = [items for _, items in scan.files]
    starts = np.cumsum([0, *items])
    files_kept = [int((states[start : start + size] <= State.val).sum()) for start, size in zip(starts, items, strict=False)]
    states.flush()
    found = Selection(of, items, files_kept, end, text_bytes, _counts(states))
    draft = marker.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(found)), encoding="utf-8")
    draft.replace(marker)
    return found


def selected_documents(
    files: list[TextFile], selection: Selection, rules: Rules, folder: Path, check: Callable[[Path], None]
) -> Callable[[int], Iterator[tuple[Side, Document]]]:
    """What `Corpus.documents` is for a selection: whole files before the first document wanted are passed over unopened.

    Args:
        check: raises ConfigError if the file has changed since its scan.
    """

    def documents(first: int) -> Iterator[tuple[Side, Document]]:
        start = 0
        for file, items, kept in zip(files, selection.files_items, selection.files_kept, strict=False):
            if first < kept:
                states = np.fromfile(folder / STATES, np.uint8, items, offset=start)
                check(file.path)
                yield from _documents(file, states, rules, first, check)
            first = max(0, first - kept)
            start += items

    return documents


def _documents(
    file: TextFile, states: np.ndarray, rules: Rules, first: int, check: Callable[[Path], None]
) -> Iterator[tuple[Side, Document]]:
    wanted = states <= State.val
    wanted[np.flatnonzero(wanted)[:first]] = False
    missing = int(wanted.sum())
    for item in rules.items(file, wanted[: len(wanted) - int(np.argmax(wanted[::-1]))]):
        if item.problem is not None:
            check(file.path)  # the likely reason why a second reading differs from the first
            raise ConfigError([item.problem], scope="the data")
        missing -= 1
        yield Side(int(states[item.index])), Document(file.name, item.text, item.number)
    if missing:
        check(file.path)
        raise ConfigError([(str(file.path), "ends earlier than when it was first read; run the command again")], scope="the data")


def _drop_duplicates(scan: Scan, states: np.ndarray) -> None:
    buckets = max(1, -(-len(states) // BUCKET_ITEMS))
    for bucket in range(buckets):
        parts: list[tuple[np.ndarray, ...]] = []
        for start, block in scan.records():
            chosen = (states[start : start + len(block)] == State.train) & bucket_of(block["high"], buckets, bucket)
            parts.append((np.flatnonzero(chosen) + start, block["high"][chosen], block["low"][chosen]))
        rows, high, low = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((low, high))  # stable: the first of equals is the earliest
        rows, high, low = rows[order], high[order], low[order]
        repeats = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        states[rows[1:][repeats]] = State.duplicate


def _drop_near(scan: Scan, states: np.ndarray, folder: Path, say: Say) -> None:
    """Signatures were taken of all items that passed; those of exact duplicates are not compared."""
    signatures = Signatures([(job.stem.with_suffix(".signatures"), found.passed) for job, found in scan.jobs])
    alive = np.zeros(len(signatures), bool)
    row = 0
    for start, block in scan.records():
        passed = states[start : start + len(block)][block["state"] == State.train] == State.train
        alive[row : row + len(passed)] = passed
        row += len(passed)
    near = near_duplicates(signatures, alive, folder / "bands", Clock("Compared", BANDS, say, "bands"))
    row = 0
    for start, block in scan.records():
        passed = np.flatnonzero(block["state"] == State.train) + start
        states[passed[near[row : row + len(passed)]]] = State.near_duplicate
        row += len(passed)


def _limit(scan: Scan, states: np.ndarray, max_bytes: int | None) -> tuple[int, int]:
    """Leave out what follows the document with which the limit is reached; returns the items until then, and the bytes kept."""
    total = 0
    for start, block in scan.records():
        part = states[start : start + len(block)]
        sums = total + np.cumsum(np.where(part == State.train, block["size"], 0), dtype=np.int64)
        if max_bytes is not None and sums[-1] >= max_bytes:
            last = int(np.argmax(sums >= max_bytes))
            states[start + last + 1 :] = State.beyond
            return start + last + 1, int(sums[last])
        total = int(sums[-1])
    return len(states), total


def _hold_out(scan: Scan, states: np.ndarray, val_fraction: float) -> None:
    """Put documents on the validation side; at least one, and not all."""
    threshold = np.uint64(math.ceil(val_fraction * 2**64))
    held_out = kept = 0
    lowest, highest = (2**64, 0), (-1, 0)  # hash and row; of equal hashes the first
    for start, block in scan.records():
        rows = np.flatnonzero(states[start : start + len(block)] == State.train)
        hashes = block["high"][rows]
        if len(rows):
            low, high = int(hashes.argmin()), int(hashes.argmax())
            lowest = min(lowest, (int(hashes[low]), start + int(rows[low])))
            highest = max(highest, (int(hashes[high]), start + int(rows[high])), key=lambda found: found[0])
        states[start + rows[hashes < threshold]] = State.val
        held_out += int((hashes < threshold).sum())
        kept += len(rows)
    if held_out == 0:
        states[lowest[1]] = State.val
    elif held_out == kept:
        states[highest[1]] = State.train


def _counts(states: np.ndarray) -> dict[str, int]:
    found = np.zeros(256, np.int64)
    for start in range(0, len(states), BUCKET_ITEMS):
        found += np.bincount(states[start : start + BUCKET_ITEMS], minlength=256)
    dropped = {key: int(found[state]) for state, key in DROPPED.items() if found[state]}
    kept = int(found[State.train] + found[State.val])
    return {"read": kept + sum(dropped.values()), "kept": kept, **dropped}

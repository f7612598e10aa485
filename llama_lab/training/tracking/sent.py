"""What W&B was given of a run, and what is still to give: `wandb/sent.json`, rows that grow, rows that an offline file holds."""

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

# Another sender of the same run, left behind by a parent that was killed, closes its W&B run within this time.
WAIT_SECONDS = 60.0


@dataclass
class Sent:
    """What one W&B run has been given: kept in `wandb/sent.json`, so that nothing is sent twice and nothing is left out.

    Attributes:
        id, mode, project, entity: which run it is.
        where: its address, or the folder of its newest offline file.
        metrics, samples: place of the last row given to W&B, as `GrowingRows` counts.
        best: lowest validation loss up to there.
        closed: whether W&B took everything up to there.
        lost: why W&B broke, if it did at some time, so that rows may be missing.
    """

    id: str
    mode: str
    project: str
    entity: str | None
    where: str = ""
    metrics: list[int] = field(default_factory=lambda: [0, 0])
    samples: list[int] = field(default_factory=lambda: [0, 0])
    best: float | None = None
    closed: bool = False
    lost: str | None = None

    def same_run(self, other: "Sent") -> bool:
        """Whether both mean one run of one project."""
        return (self.id, self.mode, self.project, self.entity) == (other.id, other.mode, other.project, other.entity)


class GrowingRows:
    """The rows of a .jsonl file that grows, each given once, also when the file is cut back and grows again.

    A row's place is [update, n]: it is the nth row of its update. Rows that are made again after a resume have the place they had.
    """

    def __init__(self, path: Path, last: list[int]):
        self.last = last
        self._path, self._offset, self._inode = path, 0, 0
        self._place = [0, 0]

    def new(self) -> list[dict[str, Any]]:
        """Whole rows behind the last place."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._inode, self._offset, self._place = stat.st_ino, 0, [0, 0]
            file.seek(self._offset)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self._offset += sum(map(len, lines))
        found = []
        for line in lines:
            row = json.loads(line)
            update = row["update"]
            self._place = [update, self._place[1] + 1 if update == self._place[0] else 1]
            if self._place > self.last:
                self.last = list(self._place)
                found.append(row)
        return found


def read_sent(folder: Path) -> list[Sent]:
    """The W&B runs that a run was sent to, oldest first."""
    try:
        return [Sent(**entry) for entry in json.loads((folder / "wandb" / "sent.json").read_text(encoding="utf-8"))]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return []


def write_sent(folder: Path, sent: Sent) -> None:
    """Put one entry into the list, in place of the one for the same W&B run."""
    entries = [entry for entry in read_sent(folder) if not entry.same_run(sent)] + [sent]
    path = folder / "wandb" / "sent.json"
    draft = path.with_name(".sent.json.draft")
    draft.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def sending(folder: Path) -> FileLock:
    """The lock of the one process that may send a run; another waits until it has closed its W&B run."""
    (folder / "wandb").mkdir(exist_ok=True)
    return FileLock(folder / "wandb" / ".sending.lock", timeout=WAIT_SECONDS)


def rows_in(file: Path) -> int | None:
    """Rows of history that a .wandb file holds whole; None if it is not the format that we know.

    The format is LevelDB's log behind 7 bytes of W&B's own: blocks of 32 KiB, in them pieces of records, each behind a checksum,
    a length and whether it is whole (1), a first (2), middle (3) or last (4) piece. A record's fields are Protocol Buffers'.
    """
    content = file.read_bytes() if file.is_file() else b""
    if content and not content.startswith(b":W&B"):
        return None
    count, at, record = 0, 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if kind not in (1, 2, 3, 4):
            break
        record = content[at + 7 : at + 7 + length] if kind in (1, 2) else record + content[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(content):
            break
        count += kind in (1, 4) and _is_history(record)
    return count


def _is_history(record: bytes) -> bool:
    """Whether a record is a row of history: whether field 2 comes first, or first after the record's number, field 1."""
    at = 0
    if record[:1] == b"\x08":
        at = next((place for place in range(1, len(record)) if record[place] < 0x80), 0) + 1
    return record[at : at + 1] == b"\x12"

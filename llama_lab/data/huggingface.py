"""A data set of the Hugging Face hub, or a local folder of its shape, as a corpus.

Rows are streamed through the filters into compressed .jsonl parts, so that each crosses the network once and the disk holds only
what is kept; the parts are then a text like any other. What is tested is local folders: nothing here was tried against the hub.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import HuggingFaceConfig, OnError, Problem
from llama_lab.data.cache import ContentHashes
from llama_lab.data.clock import Clock
from llama_lab.data.corpus import Corpus, Say
from llama_lab.data.near import require_signer
from llama_lab.data.reading import TextFile, require, text_of, zstd
from llama_lab.data.scan import MAX_PROBLEMS, Rules, State
from llama_lab.data.selection import DROPPED
from llama_lab.data.text import SAID_PROBLEMS, chosen_by, read_corpus

# Raised when the same data set gives other documents or another split.
FORMAT = 1
# Text of a part: what a kill may cost of what was fetched.
PART_BYTES = 64_000_000
FIELD = "text"


class HuggingFaceSource:
    """A split of a data set.

    Args:
        config: the node; its `dataset` is a local folder if there is one of that name.
        hashes: remembers the hashes of large files.
        processes: how many may read at once what was fetched; None is one a core where there is much to read.
    """

    name = "huggingface"

    def __init__(self, config: HuggingFaceConfig, hashes: ContentHashes, processes: int | None = None):
        self._config = config
        self._hashes = hashes
        self._processes = processes
        folder = Path(config.dataset).expanduser()
        self._folder = folder if folder.is_dir() else None
        self._stats: dict[Path, tuple[int, int]] = {}

    def fingerprint(self) -> str:
        """Hash of which data set is meant and of what chooses among its documents; of a local folder also of its content.

        What a data set of the hub holds is not looked at: only a `revision` that is a commit says it for good.
        """
        config = self._config
        which = [None if self._folder else config.dataset, config.subset, config.split, config.revision]
        found = hashlib.sha256(json.dumps([FORMAT, which, *chosen_by(config)]).encode())
        for path in _below(self._folder) if self._folder else ():
            self._stats[path] = _stat(path)
            found.update(f"\0{path.relative_to(self._folder or path).as_posix()}\0{self._hashes.of(path)}".encode())
        return found.hexdigest()

    def corpus(self, say: Say, work: Path) -> Corpus:
        """Fetch what is not fetched yet, filter it, and divide it as `data=text` does.

        Raises:
            ConfigError: the data set cannot be reached or has another shape, its rows are broken, or a package is missing.
        """
        subject = f"data.dataset={self._config.dataset}"
        zstd(subject)
        for link in _linked_folders(self._folder) if self._folder else ():
            rule = f"is a link to a folder, which `datasets` does not follow; data=text data.path={self._config.dataset} does"
            say(f"Left out: {link} {rule}")
        rules = Rules.of(self._config)
        if rules.near:
            require_signer()
        spool = _Spool(self._config, self._folder, rules, work / "spool", say)
        with closing(spool):
            return read_corpus(
                spool.files,
                self._config,
                replace(rules, field=FIELD, stop=True),
                work,
                say,
                subject=subject,
                processes=self._processes,
                counts=spool.dropped,
            )

    def check_unchanged(self) -> None:
        """Raise ConfigError if a file of a local folder has another size or date than when its hash was taken."""
        for path, stat in self._stats.items():
            if not path.exists() or _stat(path) != stat:
                raise ConfigError([(str(path), "changed while it was being read; run the command again")], scope="the data")


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of a part that is complete.

    Attributes:
        rows: of the data set that it was made of. A row that is dropped leaves an empty line.
        text_bytes: UTF-8 bytes of the texts in it.
        dropped: counts of rows by reason.
        state: where the data set's own iterator stood after it.
        ended: whether the data set ends with it.
    """

    rows: int
    text_bytes: int
    dropped: dict[str, int]
    state: dict[str, Any]
    ended: bool


class _Spool:
    """The parts fetched so far, and the means to fetch more."""

    def __init__(self, config: HuggingFaceConfig, folder: Path | None, rules: Rules, place: Path, say: Say):
        self._config, self._folder, self._rules, self._place, self._say = config, folder, rules, place, say
        self._subject = f"data.dataset={config.dataset}"
        self._parts: list[_Part] = []
        self._rows: Iterator[dict[str, Any]] | None = None
        self._dataset: Any = None
        self._said_problems = 0
        place.mkdir(parents=True, exist_ok=True)
        while (marker := self._path().with_suffix(".json")).exists():
            self._parts.append(_Part(**json.loads(marker.read_text(encoding="utf-8"))))

    def files(self, limit: int | None) -> tuple[list[TextFile], bool]:
        """Parts with so many bytes of text, fetched now if they are missing, and whether the data set goes on behind them."""
        ended = bool(self._parts) and self._parts[-1].ended
        have = sum(part.text_bytes for part in self._parts)
        clock = Clock("Fetched", None if limit is None else limit - have, self._say)
        fetched = 0
        while not ended and (limit is None or have < limit):
            part = self._fetch(None if limit is None else limit - have, lambda done, before=fetched: clock(before + done))
            have += part.text_bytes
            fetched += part.text_bytes
            ended = part.ended
        name = "/".join(filter(None, (self._folder.name if self._folder else self._config.dataset, self._config.subset)))
        files, first = [], 0
        for index, part in enumerate(self._parts):
            files.append(TextFile(self._path(index), f"{name}/{self._config.split}", first))
            first += part.rows
        return files, not ended

    def dropped(self) -> dict[str, int]:
        """Counts of the rows that never came into the parts."""
        totals: dict[str, int] = {}
        for key, count in chain.from_iterable(part.dropped.items() for part in self._parts):
            totals[key] = totals.get(key, 0) + count
        return {"read": sum(totals.values()), **totals}

    def close(self) -> None:
        """Let go of the network."""
        if self._rows is not None and hasattr(self._rows, "close"):
            self._rows.close()  # type: ignore[attr-defined]

    def _path(self, index: int | None = None) -> Path:
        return self._place / f"part-{len(self._parts) if index is None else index:05}.jsonl.zst"

    def _fetch(self, limit: int | None, progress: Callable[[int], None]) -> _Part:
        """Make the next part."""
        if self._rows is None:
            self._open()
        before = sum(part.rows for part in self._parts)
        rows = text_bytes = 0
        dropped: dict[str, int] = {}
        problems: list[Problem] = []
        ended = False
        path = self._path()
        draft = path.with_suffix(".draft")
        with zstd(self._subject).open(draft, "wb") as file:
            while text_bytes < (PART_BYTES if limit is None else min(limit, PART_BYTES)):
                row = self._next(before + rows)
                if row is None:
                    ended = True
                    break
                rows += 1
                text, problem = text_of(row, self._config.text_field)
                state = State.broken if problem is not None else self._rules.judge(text)
                if problem is not None and len(problems) < MAX_PROBLEMS:
                    problems.append((f"{self._config.dataset} row {before + rows}", problem))
                if state is State.train:
                    text_bytes += len(text.encode())
                    file.write(json.dumps({FIELD: text}, ensure_ascii=False).encode() + b"\n")
                else:
                    dropped[DROPPED[state]] = dropped.get(DROPPED[state], 0) + 1
                    file.write(b"\n")
                progress(text_bytes)
        self._report(problems)
        part = _Part(rows, text_bytes, dropped, self._dataset.state_dict(), ended)
        draft.replace(path)
        marker = draft.with_suffix(".marker")
        marker.write_text(json.dumps(asdict(part)), encoding="utf-8")
        marker.replace(path.with_suffix(".json"))
        self._parts.append(part)
        return part

    def _report(self, problems: list[Problem]) -> None:
        if problems and self._config.on_error is OnError.stop:
            *others, (subject, rule) = problems
            raise ConfigError([*others, (subject, f"{rule}; data.on_error=skip leaves out what cannot be read")], scope="the data")
        for place, rule in problems[: SAID_PROBLEMS - self._said_problems]:
            self._say(f"Left out: {place} {rule}")
            self._said_problems += 1

    def _open(self) -> None:
        """Find the data set and go to where the last part ended."""
        datasets = require("datasets", self._subject)
        config = self._config
        start = time.perf_counter()
        try:
            datasets.disable_progress_bars()
            path = str(self._folder.absolute()) if self._folder else config.dataset
            found = datasets.load_dataset(
                path, config.subset, split=config.split, revision=None if self._folder else config.revision, streaming=True
            )
            columns = found.column_names
        except ValueError as error:  # its message lists the subsets or splits that there are
            place = f"{self._subject} data.subset={config.subset or 'null'} data.split={config.split}"
            raise ConfigError([(place, f"cannot be found: {error}")], scope="the data") from error
        except Exception as error:  # whatever the hub's client raises
            raise self._unreachable(0, error) from error
        if columns is not None and config.text_field not in columns:
            rule = f"is no column of {config.dataset}; it has {', '.join(columns)}"
            raise ConfigError([(f"data.text_field={config.text_field}", rule)], scope="the data")
        self._dataset = found if columns is None else found.select_columns([config.text_field])
        if self._parts:
            self._dataset.load_state_dict(self._parts[-1].state)
        self._rows = iter(self._dataset)
        rows = sum(part.rows for part in self._parts)
        goes_on = f", going on after {rows:,} documents" if rows else ""
        self._say(f"Opened {config.dataset} in {time.perf_counter() - start:.1f} s{goes_on}")

    def _next(self, rows: int) -> dict[str, Any] | None:
        assert self._rows is not None
        try:
            return next(self._rows, None)
        except Exception as error:  # whatever the hub's client raises, or the reader of a broken file
            raise self._unreachable(rows, error) from error

    def _unreachable(self, rows: int, error: Exception) -> ConfigError:
        reason = (str(error).splitlines() or [""])[0]
        where = f" after {rows:,} documents" if rows else ""
        if self._folder is not None:
            remedy = (
                f"data=text data.path={self._config.dataset} reads its files one by one, names what is broken, and can leave it out"
            )
        else:
            remedy = "when the hub can be reached again, the same command goes on from what was fetched"
        return ConfigError(
            [(self._subject, f"cannot be read{where}: {type(error).__name__}: {reason}; {remedy}")], scope="the data"
        )


def _below(folder: Path) -> list[Path]:
    """Every file below a folder that is not hidden, in the order of names; as in `datasets`, none behind a link to a folder."""
    return [path for path in _visible(folder) if path.is_file()]


def _linked_folders(folder: Path) -> list[Path]:
    """Links below a folder that lead to other folders."""
    return [path for path in _visible(folder) if path.is_symlink() and path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

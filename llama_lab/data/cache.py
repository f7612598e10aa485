"""The folder that prepared data is kept in: where it is, what is in it, and how it is cleaned.

`<root>/prepared/<name>/` is one prepared data set, complete as soon as it has that name; `<name>.lock` is held while it is being
made in a draft, the hidden folder `.<name>.partial` beside it. `place` makes them. `<root>/compiled/` is what compilers keep.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config.disk import writing
from llama_lab.config.flags import Parser

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    import filelock

DAY_SECONDS = 86_400
USED_FILE = "last_used"
PARTIAL = ".partial"
"""Ends the name of a draft."""
ELSEWHERE = "set LLAMA_LAB_CACHE to a folder with room that you may write to"
# Hashing less than this is faster than remembering it.
LARGE_BYTES = 16_000_000
# A file that changed less than this before it was hashed could change again within the same tick of its clock.
SETTLED_NS = 2_000_000_000


def cache_root() -> Path:
    """`$LLAMA_LAB_CACHE`, or `llama_lab` in the place that the system keeps caches in. It need not exist."""
    chosen = os.environ.get("LLAMA_LAB_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llama_lab"


def prepared_root() -> Path:
    """Folder of the prepared data sets."""
    return cache_root() / "prepared"


def compiled_root() -> Path:
    """Folder of compiled models."""
    return cache_root() / "compiled"


def writing_cache() -> AbstractContextManager[None]:
    """Turn a cache that cannot be written into a ConfigError."""
    return writing(f"The cache {cache_root()}", ELSEWHERE, scope="the data")


def mark_used(folder: Path) -> None:
    """Note that a cache entry was used now; another user's entry may refuse, and that does no harm."""
    with suppress(OSError):
        (folder / USED_FILE).touch()


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `remove` from an entry while the context lasts; the system lets go of it when the process ends, however it ends.

    Does nothing on Windows, where files that are open cannot be removed, and for a folder that is no entry.
    """
    with ExitStack() as held:
        mark = folder / USED_FILE
        if fcntl is not None and mark.is_file():
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held.enter_context(mark.open("rb")), fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _is_in_use(folder: Path) -> bool:
    mark = folder / USED_FILE
    if fcntl is None or not mark.is_file():
        return False
    with mark.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in the cache.

    Attributes:
        name: of its folder.
        kind: what was prepared, or `unfinished`.
        bytes: on disk.
        used: seconds since the epoch, of its last use.
    """

    name: str
    path: Path
    kind: str
    bytes: int
    used: float


def entries() -> list[Entry]:
    """Everything in the cache, last used first."""
    root, compiled = prepared_root(), compiled_root()
    found = []
    for path in [*(root.iterdir() if root.is_dir() else ()), *([compiled] if compiled.is_dir() else [])]:
        with suppress(OSError):  # another process may be cleaning
            if path.is_dir():
                mark = path / USED_FILE
                used = (mark if mark.exists() else path).stat().st_mtime
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                found.append(Entry(path.name, path, _kind(path), size, used))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def remove(entry: Entry) -> bool:
    """Delete an entry, unless a process makes it or a run reads it.

    Returns:
        Whether it is gone.
    """
    name = entry.name if entry.kind != "unfinished" else entry.name.lstrip(".").rpartition(".")[0] or entry.name
    lock = entry_lock(name)
    try:
        lock.acquire(timeout=0)
    except OSError:  # a timeout is one: it is being made
        return False
    try:
        if _is_in_use(entry.path):
            return False
        doomed = entry.path
        if not entry.name.startswith("."):
            # What bears its name is complete, so the name goes first.
            doomed = entry.path.with_name(f".{name}.{secrets.token_hex(4)}")
            entry.path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError:
        return False
    finally:
        lock.release()
    return True


def entry_lock(name: str) -> "filelock.BaseFileLock":
    """The lock that is held while an entry is made or removed. The system releases it when its process ends, however it ends."""
    return lock_file(prepared_root() / f"{name}.lock")


def lock_file(path: Path) -> "filelock.BaseFileLock":
    """A lock that every user of a shared folder may hold. The file stays when it is released: deleting it would split those who
    wait."""
    import filelock

    return filelock.FileLock(path, mode=0o666)


class Remembered:
    """What was found out by reading large files, kept in the cache folder under their size and date. Threads may share one.

    Args:
        name: of the file that it is kept in.
    """

    def __init__(self, name: str) -> None:
        self._path = cache_root() / f"{name}.json"
        self._lock = threading.Lock()
        self._known: dict[str, list] = {}
        with suppress(OSError, ValueError):
            loaded = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = loaded if isinstance(loaded, dict) else {}

    def knows(self, path: Path) -> bool:
        """Whether `of` would answer without reading the file."""
        return self._entry(path, path.stat()) is not None

    def of(self, path: Path, find: Callable[[Path], Any]) -> Any:
        """What `find` says of a file, or said of it before.

        Args:
            find: reads the file; gives something that JSON can hold.

        Raises:
            OSError: the file cannot be read.
        """
        stat, now = path.stat(), time.time_ns()
        known = self._entry(path, stat)
        if known is not None:
            return known[2]
        found = find(path)
        if stat.st_size >= LARGE_BYTES and now - stat.st_mtime_ns > SETTLED_NS:
            with self._lock:
                self._known[str(path.absolute())] = [stat.st_size, stat.st_mtime_ns, found]
                self._save()
        return found

    def _entry(self, path: Path, stat: os.stat_result) -> list | None:
        known = self._known.get(str(path.absolute()))
        fits = isinstance(known, list) and len(known) == 3 and known[:2] == [stat.st_size, stat.st_mtime_ns]
        return known if fits else None

    def _save(self) -> None:
        """Whoever writes last wins; what another process loses by that is found out again."""
        draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(self._known), encoding="utf-8")
            draft.replace(self._path)


class ContentHashes:
    """SHA-256 of files; those of large files are remembered."""

    def __init__(self) -> None:
        self._remembered = Remembered("content-hashes")

    def of(self, path: Path) -> str:
        """Hash of a file's content.

        Raises:
            OSError: it cannot be read.
        """
        return self._remembered.of(path, _sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_cache_command(args: list[str]) -> int:
    """`llama-lab cache`: list what is cached, or clean it.

    Args:
        args: what follows `cache` on the command line.

    Returns:
        The exit code: 0 done, 2 not understood or no such entry, 1 something could not be removed.
    """
    try:
        chosen = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    found = entries()
    if chosen.action == "list":
        _print_list(found)
        return 0
    if chosen.name is not None:
        doomed = [entry for entry in found if entry.name == chosen.name]
        if not doomed:
            names = ", ".join(entry.name for entry in found) or "nothing"
            print(f"There is no {chosen.name} in {cache_root()}; there is {names}", file=sys.stderr)
            return 2
    elif chosen.older_than is not None:
        doomed = [entry for entry in found if time.time() - entry.used > chosen.older_than * DAY_SECONDS]
    else:
        doomed = [entry for entry in found if chosen.all or entry.kind == "unfinished"]
    return _clean(doomed)


def _parser() -> argparse.ArgumentParser:
    kept = "Prepared data and compiled models, kept so that they are made once."
    cleaned = "clean takes a NAME that list shows, --all, or --older-than DAYS"
    parser = Parser(prog="llama-lab cache", description=kept, epilog=cleaned)
    actions = parser.add_subparsers(dest="action")
    parser.set_defaults(action="list")
    actions.add_parser("list", help="what is there, with its size and last use")
    clean = actions.add_parser("clean", help="remove what stopped commands left unfinished, or what is named")
    which = clean.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", metavar="NAME", help="one entry, as `list` shows it")
    which.add_argument("--all", action="store_true", help="everything")
    which.add_argument("--older-than", type=float, metavar="DAYS", help="what was last used so many days ago")
    return parser


def _print_list(found: list[Entry]) -> None:
    print(f"{cache_root()} (LLAMA_LAB_CACHE moves it)")
    width = max((len(entry.name) for entry in found), default=0)
    kinds = max((len(entry.kind) for entry in found), default=0)
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"  {entry.name:{width}}  {_size(entry.bytes):>9}  {entry.kind:{kinds}}  last used {used}")
    print(f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}, {_size(sum(entry.bytes for entry in found))}")


def _clean(doomed: list[Entry]) -> int:
    kept = [entry for entry in doomed if not remove(entry)]
    gone = [entry for entry in doomed if entry not in kept]
    print(f"Removed {len(gone)} entr{'y' if len(gone) == 1 else 'ies'}, {_size(sum(entry.bytes for entry in gone))}")
    for entry in kept:
        print(f"{entry.name} is in use or may not be removed", file=sys.stderr)
    return 1 if kept else 0


def _kind(path: Path) -> str:
    """What the manifest says was prepared; an entry without one is not complete."""
    if path == compiled_root():
        return "compiled models"
    if path.name.startswith("."):
        return "unfinished"
    try:
        source = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["source"]
        return f"{source['data']}, {source['tokenizer']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

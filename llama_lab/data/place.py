"""Where a prepared folder comes to lie, and the draft beside it that it is made in.

A draft has one name, so that a killed command finds it and goes on. It becomes the folder in one step, under a lock: what bears the
folder's name is complete.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_lab.config.disk import writing
from llama_lab.config.errors import ConfigError
from llama_lab.data import cache
from llama_lab.data.corpus import Say
from llama_lab.data.draft import PROGRESS
from llama_lab.data.shards import MANIFEST

if TYPE_CHECKING:
    import filelock

KEY = "key"
WORK = "work"


class Stopped(KeyboardInterrupt):
    """Interrupted, with what was done kept for the next command."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that is to be made.

    Attributes:
        folder: where it comes to lie.
        lock: the file that is locked meanwhile.
        subject: what a problem is reported under.
        otherwise: what to do where nothing can be written.
        is_entry: whether it is in the cache, where what is not complete belongs to nobody.
    """

    folder: Path
    lock: Path
    subject: str
    otherwise: str
    is_entry: bool

    @classmethod
    def in_cache(cls, name: str) -> "Place":
        """The cache entry of that name."""
        root = cache.prepared_root()
        return cls(root / name, root / f"{name}.lock", f"The cache {cache.cache_root()}", cache.ELSEWHERE, True)

    @classmethod
    def at(cls, folder: Path, typed: str) -> "Place":
        """A folder of the user's own."""
        return cls(folder, folder.with_name(f".{folder.name}.lock"), typed, "name another folder", False)

    def check(self) -> None:
        """Raise ConfigError if something is there that was not prepared: known before any text is read."""
        if self.is_entry or not self.folder.exists() or (self.folder / MANIFEST).exists():
            return
        if not self.folder.is_dir() or any(self.folder.iterdir()):
            what = "holds files of something else" if self.folder.is_dir() else "is a file"
            raise ConfigError([(self.subject, f"{what}; name a folder that does not exist yet")], scope="the data")

    def is_made(self, key: str) -> bool:
        """Whether the folder is complete.

        Raises:
            ConfigError: something else is there.
        """
        self.check()
        if not (self.folder / MANIFEST).exists():
            return False
        if not self.is_entry and _key(self.folder) != key:
            rule = "holds a set that was prepared from other text or in another way; name another folder, or remove it"
            raise ConfigError([(self.subject, rule)], scope="the data")
        return True

    @property
    def draft(self) -> Path:
        """The folder that it is made in."""
        return self.folder.with_name(f".{self.folder.name}{cache.PARTIAL}")


@contextmanager
def making(place: Place, key: str, say: Say) -> Iterator[Path | None]:
    """The draft of a folder while its lock is held; None if it is complete by the time that the lock is had.

    The draft is new, or what a killed command left for the same key, and becomes the folder at the end. After an error it stays
    for the next command, unless that could not use it.

    Args:
        key: what decides on the content; a draft of another one is removed.

    Raises:
        ConfigError: the disk is full, or the place cannot be written.
        Stopped: Ctrl-C, with the draft kept.
    """
    with writing(place.subject, place.otherwise, scope="the data"):
        place.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = cache.lock_file(place.lock)
        _acquire(lock, place, say)
    try:
        if place.is_made(key):
            yield None
            return
        with writing(place.subject, place.otherwise, scope="the data"):
            _begin(place, key)
            try:
                yield place.draft
                _finish(place)
            except BaseException as error:
                _tidy(place.draft)
                if isinstance(error, KeyboardInterrupt) and place.draft.exists():
                    say(f"Interrupted; what is done is kept in {place.draft}, and the same command goes on from there")
                    raise Stopped from error
                raise
    finally:
        if not place.is_entry and (place.folder / MANIFEST).exists():
            with suppress(OSError):  # those who wait for it find the folder complete, so nobody is split by its end
                place.lock.unlink()
        lock.release()


def discard(draft: Path) -> None:
    """Say that nobody can go on from a draft, so that it is removed when the error that follows has been raised."""
    (draft / KEY).unlink(missing_ok=True)


def _acquire(lock: "filelock.BaseFileLock", place: Place, say: Say) -> None:
    import filelock

    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Another process is preparing {place.folder.name}; waiting for it")
        lock.acquire()


def _begin(place: Place, key: str) -> None:
    """Find the draft, or make an empty one. The lock is held and the folder is not complete."""
    if place.is_entry and place.folder.exists():
        shutil.rmtree(place.folder)
    if place.draft.exists() and _key(place.draft) != key:
        if not place.is_entry and _key(place.draft) is None and any(place.draft.iterdir()):
            rule = "is in the way and was not left by this command; move it, or name another folder"
            raise ConfigError([(str(place.draft), rule)], scope="the data")
        shutil.rmtree(place.draft)
    if not place.draft.exists():
        place.draft.mkdir()  # not by tempfile, whose folders other users may not enter
        (place.draft / KEY).write_text(key, encoding="ascii")


def _finish(place: Place) -> None:
    (place.draft / KEY).unlink(missing_ok=True)
    if place.folder.is_dir():
        place.folder.rmdir()  # only an empty one may make way
    place.draft.replace(place.folder)


def _key(draft: Path) -> str | None:
    """What a draft is made for."""
    with suppress(OSError):
        return (draft / KEY).read_text(encoding="ascii")
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((draft / MANIFEST).read_text(encoding="utf-8"))["source"]["key"]
    return None


def _tidy(draft: Path) -> None:
    """Remove a draft that the next command would gain nothing from."""
    work = draft / WORK
    begun = (draft / PROGRESS).exists() or (work.is_dir() and any(work.iterdir()))
    if not begun or _key(draft) is None:
        shutil.rmtree(draft, ignore_errors=True)

"""What the processes of a run tell each other beside the collectives: where each is, and why one has failed.

It has to work when a process is stopped, dead, or stuck in a collective, so it is files in a folder that all of them see. Losing it
costs a run nothing but the names in an error message.
"""

import contextlib
import json
import os
import shutil
import signal
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.training.errors import Diverged, OutOfMemory, RankFailed, SaveFailed

# What gloo and NCCL say in a process whose partner has died: a consequence, never the cause.
CONTACT_LOST = ("gloo/transport", "gloo::", "Connection closed by peer", "Connection reset by peer", "NCCL", "c10d")
NAMED = {kind.__name__: kind for kind in (Diverged, OutOfMemory, SaveFailed)}


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a process said it was.

    Attributes:
        beat: grows as long as the process is not stopped.
        stage: how many places it has told so far; processes in step have told equally many.
        place: the last of them, in words.
        waits: whether it waits there for the other processes, or may do so.
        process, host: who it is, for somebody who wants to look at it.
    """

    beat: int
    stage: int
    place: str
    waits: bool
    process: int
    host: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a process ended.

    Attributes:
        rank: which.
        kind: the exception's class; empty where there was none.
        message: in one line or a few.
        trace: the traceback, empty where there is none.
        is_consequence: whether it only lost contact to another process.
        problems: of a ConfigError.
        time: seconds since the epoch.
    """

    rank: int
    kind: str
    message: str
    trace: str = ""
    is_consequence: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)
    time: float = field(default_factory=time.time)

    def error(self) -> Exception:
        """What the parent of the processes raises for it."""
        if self.kind == "ConfigError":
            return ConfigError([(subject, rule) for subject, rule in self.problems])
        if self.kind in NAMED:
            return NAMED[self.kind](self.message)
        if not self.trace:
            return RankFailed(self.message)
        return RankFailed(f"rank {self.rank} failed, and the others were ended\n{self.trace}".rstrip())


class Board:
    """The folder that the processes of a run write to, one file a process and kind.

    Args:
        folder: on a disk that all processes see.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @classmethod
    def beside(cls, run_folder: Path) -> "Board":
        """The board of a run, outside its folder so that it leaves nothing there."""
        return cls(run_folder.parent / ".locks" / f"{run_folder.name}.ranks")

    def clear(self) -> None:
        """Begin anew, or remove what is left; only where no process of the run is at work."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def show(self, rank: int, whereabouts: Whereabouts) -> None:
        """Say where a process is."""
        self._write(f"at-{rank}", asdict(whereabouts))

    def leave(self, rank: int) -> None:
        """Say that a process is done and will not be anywhere any more."""
        with contextlib.suppress(OSError):
            (self._folder / f"at-{rank}.json").unlink(missing_ok=True)

    def everybody(self) -> dict[int, Whereabouts]:
        """Where the processes are, by rank, as far as they have said so."""
        return {int(name): Whereabouts(**content) for name, content in self._read("at-").items()}

    def ask_for_stacks(self) -> None:
        """Ask every process that still answers to write down where it stands."""
        self._write("stacks", {})

    def are_stacks_asked_for(self) -> bool:
        """Whether one has asked."""
        return (self._folder / "stacks.json").is_file()

    def report(self, failure: Failure) -> None:
        """Say why a process ends. The first word of a process counts."""
        if failure.rank not in {known.rank for known in self.failures()}:
            self._write(f"failed-{failure.rank}", asdict(failure))

    def failures(self) -> list[Failure]:
        """Why processes have ended: causes before consequences, and then in the order of time."""
        found = [Failure(**content) for content in self._read("failed-").values()]
        return sorted(found, key=lambda failure: (failure.is_consequence, failure.time))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f".{name}"
            draft.write_text(json.dumps(content), encoding="utf-8")
            os.replace(draft, self._folder / f"{name}.json")

    def _read(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Contents of the files that begin so, by the rest of their names."""
        found = {}
        for path in self._folder.glob(f"{prefix}*.json"):
            with contextlib.suppress(OSError, ValueError):
                found[path.stem.removeprefix(prefix)] = json.loads(path.read_text(encoding="utf-8"))
        return found


def failure_of(rank: int, error: BaseException) -> Failure:
    """An exception as the others may read it."""
    message = str(error)
    lost = isinstance(error, RuntimeError) and type(error).__name__ not in NAMED and any(sign in message for sign in CONTACT_LOST)
    problems = error.problems if isinstance(error, ConfigError) else []
    trace = "".join(traceback.format_exception(error))
    return Failure(rank, type(error).__name__, message, trace, lost, problems)


def signal_name(number: int) -> str:
    """SIGKILL of 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

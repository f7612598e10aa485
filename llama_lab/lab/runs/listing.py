"""Runs at a glance: what their small files say, read so that a thousand of them take a second.

A config is read line by line, as we write it, and not as YAML: its values stay text until somebody compares them.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import is_science, outputs_folder
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import Problem
from llama_lab.lab.labels import differences_of
from llama_lab.lab.patterns import is_aside, matches
from llama_lab.lab.runs.sweeps import STOPPED_EARLY, read_sweep, was_stopped_early
from llama_lab.training.run_folder import relative

LINE = re.compile(r"^( *)([\w.]+):(?: (.*))?$")
ITEM = re.compile(r"^( *)- (.*)$")
FILES = ("summary.json", "metrics.jsonl", "train.log", "config.yaml")
# A process whose number is taken by another one since would look alive; nothing has been written for so long then.
QUIET_SECONDS = 300.0
DEAD, RUNNING = "dead", "running"
STATES = ("started", RUNNING, "preempted", "failed", DEAD, STOPPED_EARLY, "finished")
"""What a run can be in."""
UNTOLD = ("name", "fresh", "accept_changes", "budget", "wandb")
"""Parts of a config that say nothing of what a run is."""


@dataclass(frozen=True)
class Glance:
    """A run as its files show it from outside.

    Attributes:
        folder: absolute.
        name: study and run id.
        status: what it says of itself; `dead` where it says that it runs and no process of it does; `stopped early` where a sweep
            left it before its end.
        config: value as written, by key path; the option of a group by the group's name.
        summary: last values.
        touched: when something was written last, in seconds since the epoch.
        holder: who trains it, as its lock says.
        differs: what of its config tells it from the other runs of its study, if they were looked at beside it.
    """

    folder: Path
    name: str
    status: str
    config: dict[str, str]
    summary: dict[str, Any]
    touched: float
    holder: dict[str, Any] = field(default_factory=dict)
    differs: str = ""

    @property
    def total_tokens(self) -> int | None:
        """Tokens of all whole updates; None if the config does not say."""
        try:
            budget, update = int(self.config["training_tokens"]), int(self.config["data.tokens_per_update"])
        except (KeyError, ValueError):
            return None
        return budget // update * update


def find_folders(words: Iterable[str]) -> list[Path]:
    """Run folders that words name, each once: runs, folders of runs or of studies, patterns, sweeps; no words: all in outputs/.

    Raises:
        ConfigError: a word names nothing.
    """
    found: dict[Path, None] = {}
    problems: list[Problem] = []
    listed = list(words)
    for word in listed or [str(outputs_folder())]:
        try:
            folders = _named(word)
        except ConfigError as error:
            problems += error.problems
            continue
        if not folders and listed:
            instead = or_meant(Path(word).expanduser(), "name a run's folder, a folder of runs, a sweep, or a pattern of these")
            problems.append((word, f"names no run; {instead}"))
        found |= dict.fromkeys(folders)
    if problems:
        raise ConfigError(problems, scope="this request")
    return list(found)


def look_at(folder: Path, now: float | None = None) -> Glance:
    """A run at a glance.

    Args:
        now: seconds since the epoch.

    Raises:
        ConfigError: its files cannot be read, with what is wrong.
    """
    try:
        config = _read_config((folder / "config.yaml").read_text(encoding="utf-8"))
        summary = _read_object(folder / "summary.json")
        touched = _touched(folder)
    except FileNotFoundError:
        raise _broken(folder, "has no config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(folder, f"cannot be read: {error}") from None
    except ValueError as error:
        raise _broken(folder, f"has a damaged summary.json: {error}") from None
    if "training_tokens" not in config:
        raise _broken(folder, "has a config.yaml that is none of ours: training_tokens is not in it")
    status, holder = _state(folder, summary, touched, now or time.time())
    return Glance(folder, f"{folder.parent.name}/{folder.name}", status, config, summary, touched, holder)


def beside_each_other(runs: Sequence[Glance]) -> list[Glance]:
    """The same runs, each with what tells it from those of its study: names of folders have no room for that."""
    studies: dict[Path, list[Glance]] = {}
    for run in runs:
        studies.setdefault(run.folder.parent, []).append(run)
    said: dict[Path, str] = {}
    for study in studies.values():
        told = [_telling(run.config) for run in study]
        said |= dict(zip((run.folder for run in study), differences_of(told), strict=True))
    return [replace(run, differs=said[run.folder]) for run in runs]


def _telling(config: dict[str, str]) -> dict[str, str]:
    """The values that a run is told from others by, those that decide its curve in front."""
    kept = {key: value for key, value in config.items() if key.partition(".")[0] not in UNTOLD}
    return dict(sorted(kept.items(), key=lambda item: not is_science(item[0])))


def status_of(folder: Path, summary: dict[str, Any]) -> str:
    """What a run is: what its summary says, but `dead` where that says that it runs and no process of it does, and `stopped early`
    where a sweep has left it before its end.

    Args:
        folder: absolute, with a config.yaml.
    """
    return _state(folder, summary, _touched(folder), time.time())[0]


def _state(folder: Path, summary: dict[str, Any], touched: float, now: float) -> tuple[str, dict[str, Any]]:
    """(status, who trains it)."""
    status = summary.get("status", "started")
    holder = _holder(folder) if status in (RUNNING, "started") else {}
    if status == RUNNING and is_alive(holder, touched, now):
        return RUNNING, holder
    if status != "finished" and was_stopped_early(folder):
        return STOPPED_EARLY, holder
    return (DEAD if status == RUNNING else status), holder


def _touched(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in FILES if (folder / name).is_file())


def is_alive(holder: dict[str, Any], touched: float, now: float) -> bool:
    """Whether the process that a lock names is there, as far as that can be told from here.

    Args:
        touched: when the run was written last.
    """
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return now - touched < QUIET_SECONDS
    if os.name != "posix":  # where asking after a process by a signal would end it
        return now - touched < QUIET_SECONDS
    try:
        os.kill(int(holder["process"]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, KeyError, ValueError, OverflowError):
        return False
    return True


def _named(word: str) -> list[Path]:
    path = Path(word).expanduser().absolute()
    if path.is_dir():
        return _inside(path)
    if path.name == "summary.csv" and path.is_file():
        return _inside(path.parent)
    return [run for match in matches(word) if match.is_dir() for run in _inside(match)]


def _inside(path: Path) -> list[Path]:
    """Runs of a folder: itself, those of a sweep, those in it, those one folder further down."""
    if (path / "config.yaml").is_file():
        return [path]
    if sweep := read_sweep(path):
        folders = [Path(os.path.normpath(path / job["folder"])) for job in sweep["jobs"]]
        return [folder for folder in folders if folder.is_dir()]
    if any((path / name).is_file() for name in ("meta.json", *FILES)):
        return [path]
    # A folder with rows or a summary and no config is a run that was damaged, and named as such.
    files = [entry for depth in ("*", "*/*") for name in FILES[:2] + FILES[3:] for entry in path.glob(f"{depth}/{name}")]
    return sorted({entry.parent for entry in files if not is_aside(entry.parent)})


def _read_config(text: str) -> dict[str, str]:
    """Values by key path; where they came from, by group: the option that was chosen."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            if (item := ITEM.match(line)) and path and path[-1][0] == len(item[1]):  # of a list, which stands as far in as its key
                key = ".".join(name for _, name in path)
                found[key] = f"{found[key][:-1]},{item[2]}]" if key in found else f"[{item[2]}]"
            continue
        indent = len(match[1])
        while path and path[-1][0] >= indent:
            path.pop()
        key = ".".join([name for _, name in path] + [match[2]])
        if match[3] is None:
            path.append((indent, match[2]))
        elif key.startswith("origin.choices."):
            found[match[2]] = match[3]
        elif not key.startswith("origin."):
            found[key] = match[3]
    return found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def _holder(folder: Path) -> dict[str, Any]:
    try:
        return _read_object(folder.parent / ".locks" / f"{folder.name}.json")
    except (OSError, ValueError):
        return {}


def _broken(folder: Path, rule: str) -> ConfigError:
    return ConfigError([(relative(folder), rule)], scope="this run")

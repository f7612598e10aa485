"""A run's folder: who may write in it, what it says of where the run came from, and whether it may go on.

Torch-free, so that a run that is finished, running or changed is answered before anything heavy is imported.
"""

import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llama_lab.config import devices
from llama_lab.config.disk import replace_text, why, writing
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, outputs_folder, save_config, science
from llama_lab.config.paths import or_meant
from llama_lab.config.schema import Device, RunConfig, WsdConfig
from llama_lab.training.run_names import runs_called
from llama_lab.training.saving.manifest import MANIFEST, checkpoint_folders, tokens_of
from llama_lab.training.scrub import scrub_command, scrub_patch

FORMAT_VERSION = 1
DAMAGED_META = (
    "is empty or cut, and a run is not continued without knowing what it came from; put it back from a copy, or move it away to go "
    "on all the same, or start the run anew with fresh=true"
)
ELSEWHERE = "set LLAMA_LAB_OUTPUTS to a folder with room that you may write to"
VERSIONED = ("torch", "numpy", "tokenizers", "llama_lab")
# Runs of a study that are looked at, the newest first, for one that a new run only extends: reading a config takes milliseconds.
SIBLINGS = 20
# Runs that are named where a folder of several stands in place of one.
SHOWN = 8


class RunFolder:
    """The files of one run that are read and written as a whole. Rows that grow are `metrics.py`'s."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def meta(self) -> dict[str, Any]:
        """Where the run came from; empty before it began.

        Raises:
            ConfigError: the file is damaged.
        """
        return _read_json(self.path / "meta.json", damaged=DAMAGED_META)

    def summary(self) -> dict[str, Any]:
        """Status, last and best values; empty before the first was written, or where the file is damaged."""
        return _read_json(self.path / "summary.json")

    def write_meta(self, **changes: Any) -> None:
        """Merge `changes` into meta.json."""
        write_json(self.path / "meta.json", self.meta() | changes)

    def write_summary(self, **changes: Any) -> None:
        """Merge `changes` into summary.json."""
        # With every row, and so the disk is not waited for: the rows say again what a power cut can take.
        write_json(self.path / "summary.json", self.summary() | changes, durable=False)

    def writing(self) -> AbstractContextManager[None]:
        """Turn a folder that cannot be written into a ConfigError."""
        return writing(relative(self.path), ELSEWHERE)

    @property
    def saved_tokens(self) -> list[int]:
        """Tokens trained on in each of its checkpoints, in order."""
        named = ((tokens_of(path), path) for path in checkpoint_folders(self.checkpoints))
        return sorted(tokens for tokens, path in named if tokens is not None and (path / MANIFEST).is_file())

    def left(self, run: RunConfig) -> float:
        """The share of a run's updates that is still to be trained, should it go on here: 0 once it is finished."""
        if run.fresh:
            return 1.0
        saved = max(self.saved_tokens, default=0) / (run.updates * run.data.tokens_per_update)
        return 0.0 if self.finished else max(0.0, 1.0 - saved)

    @property
    def finished(self) -> bool:
        """Whether the run has done all of its updates."""
        return self.summary().get("status") == "finished"


@contextmanager
def open_run(run: RunConfig, path: Path, *, origin: dict[str, Any]) -> Iterator[RunFolder]:
    """Take hold of a run's folder for as long as the context lasts; create it, or check that it may go on.

    Args:
        run: the resolved config.
        path: the run's folder, from its identity.
        origin: what this start is made from, as `describe_origin` gives it.

    Raises:
        ConfigError: the run is held by another process, the folder cannot be written, or code, versions or data changed
            since it began and neither `fresh` nor `accept_changes` says what to do.
    """
    folder = RunFolder(path)
    with hold_run(path):
        with folder.writing():
            _begin(run, folder, origin)
        yield folder


def _begin(run: RunConfig, folder: RunFolder, origin: dict[str, Any]) -> None:
    """Note a start in a run's folder, which is held; create it, or check that it may go on."""
    path = folder.path
    if run.fresh and path.exists() and not _is_automatic_restart():
        move_aside(path)
    known = folder.meta()
    if known and not folder.finished:
        # A run that has saved nothing begins at its first update: there is nothing in it that the change could spoil.
        changed = changes_since(known, origin) if checkpoint_folders(folder.checkpoints) else []
        if changed and not run.accept_changes:
            rule = "since this run began; fresh=true starts it anew, accept_changes=true goes on"
            raise ConfigError(
                [(f"{name} changed from {before} to {now}", rule) for name, before, now in changed], scope=f"continuing {path}"
            )
        restore_config(run, folder, print)
        _remove_drafts(path)
        folder.write_meta(**origin, starts=[*known["starts"], _start(origin)])
    elif not known:
        path.mkdir(parents=True, exist_ok=True)
        _remove_drafts(path)
        save_config(run, path / "config.yaml")
        folder.write_meta(format_version=FORMAT_VERSION, run_id=path.name, name=run.name, **origin, starts=[_start(origin)])


def named_run(typed: Path) -> Path:
    """The folder that a user means: what was typed, or where that is no path the run in the outputs folder of that name or hash.

    Raises:
        ConfigError: several runs are called so.
    """
    path = typed.expanduser()
    if os.path.exists(path):  # noqa: PTH110 - a text that is no path at all is answered, not an error
        return path
    found = runs_called(typed)
    if len(found) > 1:
        more = f", … ({len(found)} in all)" if len(found) > SHOWN else ""
        there = ", ".join(relative(run) for run in found[:SHOWN])
        rule = f"is what {len(found)} runs are called; name one of them: {there}{more}"
        raise ConfigError([(str(typed), rule)], scope="this request")
    return found[0] if found else path


def find_run(path: Path) -> RunFolder:
    """The run that a user named: by its folder, its name, or the hash at the end of that.

    Raises:
        ConfigError: there is none, or there are several.
    """
    path = named_run(path)
    if not os.path.isfile(path / "config.yaml") or (path / MANIFEST).is_file():  # noqa: PTH113 - as above
        raise ConfigError([(str(path), no_run(path))], scope="this request")
    return RunFolder(path.absolute())


def no_run(path: Path) -> str:
    """Why what a user named is no run, and what to name instead."""
    instead = "name a run's folder, outputs/<name>/<run id>"
    if not os.path.exists(path):  # noqa: PTH110 - as above
        places = ((path.parent, "*"), (path.parent.parent, "*/*"), (outputs_folder(), "*/*"))
        runs = {run.name: run for place, depth in places for run in _runs(place, depth)}
        close = difflib.get_close_matches(path.name, runs, n=1) or [name for name in runs if name.startswith(path.name)]
        return "does not exist; " + (f"did you mean {relative(runs[close[0]].absolute())}?" if close else or_meant(path, instead))
    if not path.is_dir():
        return f"is a file; {instead}"
    if (path / MANIFEST).is_file():
        run = relative(path.absolute().parent.parent)
        return f"is one checkpoint of the run {run}; name that, and which of its updates is meant beside it"
    if runs := _runs(path, "*") or _runs(path, "*/*"):
        more = f", … ({len(runs)} in all)" if len(runs) > SHOWN else ""
        return f"holds no run itself; runs in it: {', '.join(relative(run.absolute()) for run in runs[:SHOWN])}{more}"
    try:
        foreign = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = " ".join(foreign.get("architectures") or [foreign["model_type"]])
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return f"holds no run; {instead}"
    return f"holds no run but a Hugging Face model, {kind}; llama-lab import makes a run of one that is a LlamaForCausalLM"


def _runs(folder: Path, depth: str) -> list[Path]:
    """Runs in a folder, at a depth."""
    return sorted(config.parent for config in folder.glob(f"{depth}/config.yaml") if (config.parent / "meta.json").is_file())


def restore_config(run: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Write a run's config.yaml again where somebody has removed it: the request that finds the folder has the same identity."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        save_config(run, path)
        say(f"{relative(path)} was missing; it is written again, as this command has it")


def describe_origin(
    run: RunConfig, *, command: list[str] | None, data: dict[str, Any], validation: str | None = None
) -> dict[str, Any]:
    """What a start is made from: command, code, library versions, machine, data.

    Args:
        data: fingerprint of the data and hash of the tokenizer.
        validation: what tells the validation text from another; null: unknown.
    """
    return {
        "command": None if command is None else scrub_command(command),
        "code": {"sha256": _code_hash(), **_git()},
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in VERSIONED}},
        "machine": {
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "processor": devices.probe_cuda().name if run.hardware.device is Device.cuda else devices.cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS") or str(devices.usable_cores()),
            "device": run.hardware.device.value,
            "processes": run.hardware.processes,
        },
        "data": data,
        "validation": validation,
    }


def changes_since(known: dict[str, Any], origin: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, now) of what differs between the origin that meta.json knows and another one: code, versions, data."""
    pairs = [("the source code", _code_said(known["code"]), _code_said(origin["code"]))]
    if known["code"]["sha256"] == origin["code"]["sha256"]:
        pairs = []  # another commit with the same sources
    pairs += [(f"{name}'s version", known["versions"].get(name), now) for name, now in origin["versions"].items()]
    pairs += [(f"the {name}", str(known["data"].get(name))[:12], str(now)[:12]) for name, now in origin["data"].items()]
    return [(name, str(before), str(now)) for name, before, now in pairs if before != now]


def write_json(path: Path, content: dict[str, Any], *, durable: bool = True) -> None:
    """Replace a small JSON file in one step; see `replace_text`."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", durable=durable)


def shorter_run(run: RunConfig, folder: Path) -> str | None:
    """A hint at a finished run that differs from a new one in a smaller budget alone: it can be extended instead.

    Args:
        run: the resolved config.
        folder: where its own folder is, or would be.
    """
    if folder.exists() or not folder.parent.is_dir():
        return None
    asked = science(run) | {"training_tokens": None}
    finished = [path for path in folder.parent.iterdir() if RunFolder(path).finished]
    for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True)[:SIBLINGS]:
        try:
            other = load_config(path / "config.yaml")
        except ConfigError:  # of another version
            continue
        longer = extending_command(other, path, run.training_tokens)
        if other.training_tokens < run.training_tokens and science(other) | {"training_tokens": None} == asked and longer:
            return (
                f"A finished run of {other.training_tokens:,} tokens differs in its budget alone. To go on from it instead of from "
                f"nothing:\n  {longer}"
            )
    return None


def relative(path: Path) -> str:
    """A path as short as it can be typed from the working directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def extending_command(run: RunConfig, path: Path, training_tokens: int, *, updates: Sequence[int] | None = None) -> str | None:
    """What to type to go on from a finished run to a larger budget; None if it has no checkpoint.

    It starts from the newest checkpoint before the learning rate began to fall, else from the newest; never from what the run
    itself began with, an import or its parent's state.

    Args:
        updates: those whose checkpoints are whole; None: every one there is.
    """
    if updates is None:
        updates = [tokens // run.data.tokens_per_update for tokens in RunFolder(path).saved_tokens]
    begun = RunFolder(path).meta().get("lineage", {}).get("update", -1)
    updates = sorted(update for update in updates if update > begun)
    if not updates:
        return None
    stable = run.updates
    if isinstance(run.schedule, WsdConfig):
        stable -= run.schedule.cooldown_updates(run.updates)
    update = max((update for update in updates if update <= stable), default=updates[-1])
    return f"llama-lab fork {shlex.quote(relative(path))} --update {update} training_tokens={training_tokens}"


def _start(origin: dict[str, Any]) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"time": now, "command": origin["command"], "host": origin["machine"]["host"], "directory": str(Path.cwd())}


def _code_said(code: dict[str, Any]) -> str:
    """The sources in a few characters, and the commit if there is one."""
    commit = f" (commit {code['commit'][:12]})" if "commit" in code else ""
    return code["sha256"][:12] + commit


@contextmanager
def hold_run(path: Path, instead: str = "wait for it, or change name=… or the config") -> Iterator[None]:
    """Hold the run's lock, which lies beside its folder so that the folder can be moved. The system frees it when we die.

    Args:
        path: the run's folder; it need not exist.
        instead: what to do where another process holds it.

    Raises:
        ConfigError: another process holds it, or the lock cannot be written.
    """
    locks = path.parent / ".locks"
    lock = FileLock(locks / f"{path.name}.lock", timeout=0)
    with writing(relative(path.parent), ELSEWHERE):
        locks.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = _read_json(locks / f"{path.name}.json")
            who = f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
            raise ConfigError([(str(path), f"is being trained by {who if holder else 'another process'}; {instead}")]) from None
    try:
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with writing(relative(path.parent), ELSEWHERE):
            write_json(locks / f"{path.name}.json", holder)
        yield
    finally:
        with suppress(OSError):
            (locks / f"{path.name}.json").unlink(missing_ok=True)
        lock.release()


def _remove_drafts(path: Path) -> None:
    """Remove files that a kill left half-written."""
    for draft in path.glob(".*.draft"):
        draft.unlink()


def _is_automatic_restart() -> bool:
    """Whether torchrun or Slurm started this command again by itself; what it typed, `fresh=true` say, was meant once."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def move_aside(path: Path) -> None:
    """Rename a folder to the first free `<name>.1`, `<name>.2`, …"""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)


def _code_hash() -> str:
    """SHA-256 over the package's own sources, by relative name and content."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _git() -> dict[str, Any]:
    """Commit and uncommitted changes of the checkout that the package runs from; nothing where there is none."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                encoding="utf-8",
                errors="replace",
                # Under a limit on the size of files it would else be killed by a signal, and leave the checkout's index locked.
                restore_signals=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    # An installed package can lie inside somebody else's checkout (a virtual environment in a project): that commit says nothing.
    if git("ls-files", "--error-unmatch", "__init__.py") is None or (commit := git("rev-parse", "HEAD")) is None:
        return {}
    return {"commit": commit.strip(), "diff": scrub_patch(git("diff", "HEAD", "--", ".") or "")}


def package_version(name: str) -> str | None:
    """The installed version of a package, or of `python`; None if it runs from a folder without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return sys.version.split()[0] if name == "python" else None


def _read_json(path: Path, *, damaged: str | None = None) -> dict[str, Any]:
    """A small JSON file; empty where there is none.

    Args:
        damaged: what to say of one that is not whole; None: it is taken to be empty.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:  # empty or cut, by a power cut say
        content = None
    except PermissionError as error:
        raise ConfigError([(relative(path), f"cannot be read: {why(error)}; {ELSEWHERE}")]) from None
    if isinstance(content, dict):
        return content
    if damaged is None:
        return {}
    raise ConfigError([(relative(path), damaged)])

"""What differs between two runs, and may explain why they do not end alike: config, code, data, environment, what they were fed.

Each difference says whether it can move the loss curve. What cannot (names, logging, where checkpoints go) is counted, not shown.
"""

import difflib
import filecmp
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import SCIENCE, plain_config, science
from llama_lab.config.schema import shown
from llama_lab.lab.compare.records import PATHS, RunRecord, flat
from llama_lab.training.metrics import read_rows

CONFIG, CODE, DATA, ENVIRONMENT, FED = "config", "code", "data", "environment", "fed"
MEASURING = ("eval",)
PATCH_LINES = 400
VALUE_CHARACTERS = 200
HASH_CHARACTERS = 12
ABSENT = "-"
# What of a machine decides how numbers are rounded, or how fast they come; its name and its system's do neither.
MACHINE = ("device", "processor", "processes", "threads")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs.

    Attributes:
        part: one of the constants above.
        what: a key path, a package, a part of the data.
        a, b: what it is in either run.
        matters: whether it can move the loss curve beyond float noise.
    """

    part: str
    what: str
    a: str
    b: str
    matters: bool


def differences(a: RunRecord, b: RunRecord) -> list[Difference]:
    """Everything that differs between two runs, the weightiest first.

    Raises:
        ConfigError: one of them is no run's folder.
    """
    if missing := [run.name for run in (a, b) if run.run is None]:
        raise ConfigError([(name, "has no folder to look into; name two runs' folders") for name in missing], scope="this request")
    found = [*_config(a, b), *_code(a, b), *_data(a, b), *_fed(a, b), *_environment(a, b)]
    return sorted(found, key=lambda one: not one.matters)


def code_changes(a: RunRecord, b: RunRecord) -> list[str]:
    """How the code of two runs differs, as far as it can be told here: commits between, files, and the two patches.

    Returns:
        Lines of a diff of what was not committed in either run, bounded; before it, what Git says of the two commits if this
        checkout has them.
    """
    ours, theirs = (run.meta.get("code") or {} for run in (a, b))
    if ours.get("sha256") == theirs.get("sha256"):
        return []
    lines: list[str] = []
    if (before := ours.get("commit")) and (after := theirs.get("commit")) and before != after:
        lines += _between(before, after) or ["(this checkout does not have both commits)"]
    mine, other = ((code.get("diff") or "").splitlines() for code in (ours, theirs))
    if mine != other:
        lines += difflib.unified_diff(mine, other, f"uncommitted in {a.name}", f"uncommitted in {b.name}", lineterm="", n=1)
    if len(lines) > PATCH_LINES:
        lines = [*lines[:PATCH_LINES], f"… ({len(lines) - PATCH_LINES} more lines; meta.json has them)"]
    return lines


def _config(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    assert a.run is not None and b.run is not None
    deciding = [flat(science(run)) for run in (a.run, b.run)]
    others = [flat({name: node for name, node in plain_config(run).items() if name not in SCIENCE}) for run in (a.run, b.run)]
    data = [(run.meta.get("data") or {}).get("data") for run in (a, b)]
    idle = PATHS if None not in data and data[0] == data[1] else ()
    for (ours, theirs), decides in ((deciding, True), (others, False)):
        for key in dict.fromkeys((*ours, *theirs)):
            before, after = ours.get(key, ABSENT), theirs.get(key, ABSENT)
            if before != after:
                matters = (decides and key not in idle) or key.partition(".")[0] in MEASURING
                yield Difference(CONFIG, key, _value(before), _value(after), matters)


def _code(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    ours, theirs = (run.meta.get("code") or {} for run in (a, b))
    if ours.get("sha256") == theirs.get("sha256"):
        return
    yield Difference(CODE, "sources", _hash(ours.get("sha256")), _hash(theirs.get("sha256")), True)
    if ours.get("commit") != theirs.get("commit"):
        yield Difference(CODE, "commit", _hash(ours.get("commit")), _hash(theirs.get("commit")), True)
    mine, other = (code.get("diff") or "" for code in (ours, theirs))
    if mine != other:
        files = [", ".join(_files(patch)) or "none" for patch in (mine, other)]
        yield Difference(CODE, "uncommitted files", files[0], files[1], True)


def _data(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    names = {"data": "training tokens and tokenizer", "tokenizer": "tokenizer"}
    ours, theirs = (run.meta.get("data") or {} for run in (a, b))
    for key, what in names.items():
        if ours.get(key) != theirs.get(key):
            yield Difference(DATA, what, _hash(ours.get(key)), _hash(theirs.get(key)), True)
    before, after = (run.meta.get("validation") for run in (a, b))
    if before != after:
        said = [_hash(text) if text else "not recorded" for text in (before, after)]
        yield Difference(DATA, "validation text", said[0], said[1], None not in (before, after))


def _fed(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    """The first update in which two runs were fed something else."""
    if a.folder is None or b.folder is None:
        return
    paths = [folder / "batches.jsonl" for folder in (a.folder, b.folder)]
    if all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False):
        return
    hashes = [{row["update"]: row["hash"] for row in read_rows(path)} for path in paths]
    common = sorted(hashes[0].keys() & hashes[1].keys())
    other = next((update for update in common if hashes[0][update] != hashes[1][update]), None)
    if other is not None:
        yield Difference(FED, f"windows from update {other} on", hashes[0][other], hashes[1][other], True)


def _environment(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    for part, keys in (("versions", None), ("machine", MACHINE)):
        ours, theirs = (run.meta.get(part) or {} for run in (a, b))
        for key in keys or dict.fromkeys((*ours, *theirs)):
            if ours.get(key) != theirs.get(key):
                # Our own version is said by the code, and better.
                yield Difference(ENVIRONMENT, key, _value(ours.get(key)), _value(theirs.get(key)), key != "llama_lab")
    hosts = [(run.meta.get("machine") or {}).get("host") for run in (a, b)]
    if hosts[0] != hosts[1]:
        yield Difference(ENVIRONMENT, "host", _value(hosts[0]), _value(hosts[1]), False)


def _between(before: str, after: str) -> list[str]:
    """Commits that one has and the other has not, and the files of the package that they touch."""
    package = Path(__file__).parents[2]

    def git(*arguments: str) -> list[str] | None:
        words = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.splitlines() if done.returncode == 0 else None

    log = git("log", "--oneline", "--no-decorate", "--left-right", f"{before}...{after}", "--", ".")
    files = git("diff", "--stat", f"{before}..{after}", "--", ".")
    if log is None or files is None:
        return []
    return ["commits of one and not the other:", *(f"  {line}" for line in log), "files between them:", *files]


def _files(patch: str) -> list[str]:
    """Names of the files that a patch touches."""
    return [line.rpartition(" b/")[2] for line in patch.splitlines() if line.startswith("diff --git ")]


def _value(value: Any) -> str:
    text = ABSENT if value is None or value == ABSENT else shown(value)
    return text if len(text) <= VALUE_CHARACTERS else f"{text[:VALUE_CHARACTERS]}…"


def _hash(value: Any) -> str:
    return str(value)[:HASH_CHARACTERS] if value else ABSENT

"""Checkpoints as folders: which there are, which of them are whole, and how they go. `checkpoint` writes and reads what is in them.

Torch-free, so that what is missing or damaged is answered before anything heavy is imported.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError

FORMAT_VERSION = 2
"""1 kept the state in a pickle, `state.pt`, and no checksum of the manifest; it is still read."""
MANIFEST, MODEL, STATE = "manifest.json", "model.safetensors", "state.safetensors"
WEIGHTS = (MODEL,)
"""Files of a checkpoint that its weights are in."""
ALTERED = "is not what was saved (its checksum differs)"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint whose files are not what its manifest says.

    Attributes:
        path: the file that is wrong, in the checkpoint's folder.
        rule: what is wrong with it.
    """

    def __init__(self, path: Path, rule: str):
        super().__init__(path, rule)
        self.path, self.rule = path, rule

    def __str__(self) -> str:
        return f"{self.path} {self.rule}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder.
        update, tokens: where training stood when it was written.
    """

    path: Path
    update: int
    tokens: int


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like a checkpoint, by name. Others, a copy `tokens-….bak` say, are left alone."""
    return sorted(path for path in folder.glob("tokens-*") if tokens_of(path) is not None)


def tokens_of(path: Path) -> int | None:
    """Tokens trained on in a checkpoint, by its folder's name; None if no checkpoint is named so."""
    named = re.fullmatch(r"tokens-([0-9]+)", path.name)
    return None if named is None else int(named[1])


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints in `folder`, oldest first. A folder that does not exist holds none."""
    found = []
    for path in checkpoint_folders(folder):
        try:
            manifest = read_manifest(path)
        except DamagedCheckpoint:
            continue
        found.append(Checkpoint(path, manifest["update"], manifest["tokens"]))
    return sorted(found, key=lambda checkpoint: checkpoint.update)


def list_incomplete(folder: Path) -> list[DamagedCheckpoint]:
    """What is wrong with each folder that is named like a checkpoint and has no manifest that can be read."""
    found = []
    for path in checkpoint_folders(folder):
        try:
            read_manifest(path)
        except DamagedCheckpoint as error:
            found.append(error)
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint's folder says of itself.

    Raises:
        DamagedCheckpoint: there is no manifest, or it is not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, sha256 = manifest["format_version"], manifest.pop("sha256", None)
        whole = version == 1 or sha256 == own_sha256(manifest)
        known = isinstance(manifest["update"], int) and isinstance(manifest["tokens"], int)
    except FileNotFoundError:
        raise DamagedCheckpoint(path / MANIFEST, "is missing") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        whole = known = False
        manifest = {}
    if not (whole and known):
        raise DamagedCheckpoint(path / MANIFEST, ALTERED)
    return manifest


def verify_checkpoint(checkpoint: Checkpoint, files: Sequence[str] | None = None) -> None:
    """Compare files with the manifest's size and SHA-256.

    Args:
        files: those that are needed; None: all.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
        ConfigError: the format is newer than this code.
    """
    manifest = read_manifest(checkpoint.path)
    if manifest["format_version"] > FORMAT_VERSION:
        rule = f"has format {manifest['format_version']}; this version of llama_lab reads up to {FORMAT_VERSION}: install the newer"
        raise ConfigError([(str(checkpoint.path), rule)], scope="this checkpoint")
    for name, expected in manifest["files"].items():
        if files is not None and name not in files:
            continue
        path = checkpoint.path / name
        if not path.is_file():
            raise DamagedCheckpoint(path, "is missing")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(path, ALTERED)


def is_whole(checkpoint: Checkpoint, files: Sequence[str] | None = None) -> bool:
    """Whether files of a checkpoint, None: all, are what was written; they are read in full."""
    try:
        verify_checkpoint(checkpoint, files)
    except DamagedCheckpoint:
        return False
    return True


def newest_damage(folder: Path) -> DamagedCheckpoint | None:
    """What is wrong with the newest checkpoint, which is read in full; None: nothing, or there is none."""
    path = max(checkpoint_folders(folder), default=None)
    if path is None:
        return None
    try:
        manifest = read_manifest(path)
        verify_checkpoint(Checkpoint(path, manifest["update"], manifest["tokens"]))
    except DamagedCheckpoint as error:
        return error
    return None


def retire(path: Path) -> None:
    """Remove a checkpoint. It stops being one in a single step, so that half a removal is never taken for one."""
    if path.exists():
        aside = path.with_name(f".removed-{path.name}")
        remove(aside)
        os.replace(path, aside)
        remove(aside)


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename what cannot be gone on from, `tokens-…` to `damaged-tokens-…`, so that it is not counted among those to keep.

    Args:
        folder: where the run's checkpoints lie. Only the holder of the run's lock may call it.
        after: the update that the run goes on from; complete checkpoints up to it stay where they are.

    Returns:
        The new names.
    """
    whole = {checkpoint.path for checkpoint in list_checkpoints(folder) if checkpoint.update <= after}
    moved = []
    for path in sorted(set(checkpoint_folders(folder)) - whole):
        aside = path.with_name(f"damaged-{path.name}")
        remove(aside)
        os.replace(path, aside)
        moved.append(aside)
    return moved


def remove_drafts(folder: Path) -> None:
    """Remove what a killed save or removal left behind. Only the holder of the run's lock may call it."""
    for pattern in (".draft-*", ".removed-*"):
        for left in folder.glob(pattern):
            remove(left)


def own_sha256(manifest: dict[str, Any]) -> str:
    """Of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Remove a folder that is no checkpoint any more, or that may be half of one: its manifest goes first."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A run's state on disk: written whole or not at all, named by the tokens trained on.

A checkpoint is a folder. Its `manifest.json`, with a checksum of every other file, is written last and moved into place
with the folder, so a folder without one is no checkpoint, whatever it holds.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(RuntimeError):
    """A checkpoint whose files are not what its manifest says."""


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


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints in `folder`, oldest first. A folder that does not exist holds none."""
    found = []
    for manifest in folder.glob(f"tokens-*/{MANIFEST}"):
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:  # torn by a power cut
            continue
        found.append(Checkpoint(manifest.parent, content["update"], content["tokens"]))
    return sorted(found, key=lambda checkpoint: checkpoint.update)


def save_checkpoint(
    folder: Path, *, update: int, tokens: int, model: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Checkpoint:
    """Write one checkpoint, then remove all but the newest `keep`.

    Args:
        folder: where the run's checkpoints lie.
        update, tokens: what training has done so far.
        model: weights by name, of the bare module (no wrapper's prefix).
        state: everything else that the next update depends on: tensors and plain types only.
        keep: newest checkpoints that stay.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    target = folder / f"tokens-{tokens:015d}"
    draft = folder / f".draft-{target.name}"
    _remove(draft)
    draft.mkdir(parents=True)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in model.items()}, draft / "model.safetensors")
    torch.save(state, draft / "state.pt")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(draft.iterdir())}
    for name in files:
        _sync(draft / name)
    manifest = {"format_version": FORMAT_VERSION, "update": update, "tokens": tokens, "files": files}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(draft / MANIFEST)
    _remove(target)
    os.replace(draft, target)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old.path)
    return Checkpoint(target, update, tokens)


def load_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, on the CPU: (weights by name, state), as they were given to `save_checkpoint`.

    Raises:
        DamagedCheckpoint: a file is missing, cut or altered, or the format is newer than this code.
    """
    verify_checkpoint(checkpoint)
    model = load_file(checkpoint.path / "model.safetensors")
    state = torch.load(checkpoint.path / "state.pt", map_location="cpu", weights_only=True)
    return model, state


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights alone, by name, on the CPU. Raises `DamagedCheckpoint` like `load_checkpoint`."""
    verify_checkpoint(checkpoint)
    return load_file(checkpoint.path / "model.safetensors")


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest's size and SHA-256.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format_version"] > FORMAT_VERSION:
        raise DamagedCheckpoint(
            f"{checkpoint.path} has format {manifest['format_version']}; this version reads up to {FORMAT_VERSION}"
        )
    for name, expected in manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path} is not what was saved (its checksum differs)")


def remove_drafts(folder: Path) -> None:
    """Remove what a killed save left behind. Only the holder of the run's lock may call it."""
    for draft in folder.glob(".draft-*"):
        _remove(draft)


def _remove(folder: Path) -> None:
    """Remove a folder, its manifest first, so that half a removal is not taken for a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk. Windows cannot open folders; its rename is journalled."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
